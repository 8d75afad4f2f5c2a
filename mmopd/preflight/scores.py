"""How far two scorings of the same responses differ."""

from collections.abc import Mapping, Sequence


def apart(a: Mapping[int, Sequence[float]], b: Mapping[int, Sequence[float]]) -> tuple[float, float]:
    """How far scores of the same responses differ: (mean over the tokens of the worst response, largest of all).

    The mean is what is judged: a bf16 logit between 16 and 32 has steps of 0.125, so that one token may move by
    more than a response ever should, on two GPUs of different kinds or in two batches of different size.
    """
    differences = [[abs(x - y) for x, y in zip(a[i], b[i], strict=True)] for i in a]
    return max(sum(d) / len(d) for d in differences), max(max(d) for d in differences)


def difference(mean: float, largest: float) -> str:
    """`apart` in words."""
    return f"log-probs differ by {mean:.2g} in the mean, {largest:.2g} at most" if largest else "no log-prob differs"
