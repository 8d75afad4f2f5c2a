"""Difference between two scorings of the same responses."""

from collections.abc import Mapping, Sequence


def apart(a: Mapping[int, Sequence[float]], b: Mapping[int, Sequence[float]]) -> tuple[float, float]:
    """Return how far scores of the same responses differ: (mean over the tokens of the worst response, largest of all).

    The mean decides. A bf16 logit between 16 and 32 has steps of 0.125, so that on two kinds of GPU, or in two batch
    sizes, a single token may move by more than the mean of a response may.
    """
    differences = [[abs(x - y) for x, y in zip(a[i], b[i], strict=True)] for i in a]
    return max(sum(d) / len(d) for d in differences), max(max(d) for d in differences)


def difference(mean: float, largest: float) -> str:
    """Return the result of `apart` as text."""
    return f"log-probs differ by {mean:.2g} in the mean, {largest:.2g} at most" if largest else "no log-prob differs"
