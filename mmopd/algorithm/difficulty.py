"""Offline balancing by difficulty (paper 3.3, A.1): sampling weights that flatten the histogram of right answers.

Before training, the student answers every prompt K times, c of them right. P prompts; the histogram has K + 1 bins. Two
other rules of the field are here for comparison, `drop_easy_weights` and `frontier_weights`.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmopd.algorithm.groups import first, one_of, same_length

Shape = Literal["u", "mirrored_j", "flat"]


def difficulty_weights(
    correct: Int[Tensor, " P"],
    attempts: int | Int[Tensor, " P"],
    *,
    shape: Literal["auto", "u", "mirrored_j", "flat"] = "auto",
    cap: float,
    heavy: float = 1.5,
) -> Float[Tensor, " P"]:
    """Return sampling weights of the prompts, 1..cap: none is ever dropped, some are drawn more often.

    `u` raises the middle, 1 <= c <= K - 1; `mirrored_j` all with c <= K - 1; `flat` nothing. A raised bin goes up to
    the fullest bin that is not raised (for `u`: to the lower of its two ends), by at most `cap`; a bin that is already
    fuller keeps its weight. So emptier bins get larger weights, but never overtake a fuller bin: the histogram gets
    flatter by any measure.

    Args:
        correct: right answers to each prompt.
        attempts: answers to each prompt that could be judged; K is the largest. A prompt with fewer is put in the bin
            nearest to its share of right answers, and one with none keeps weight 1.
        shape: shape of the histogram, or `auto` to detect it with `difficulty_shape`.
        cap: largest weight, >= 1.
        heavy: as in `difficulty_shape`.

    Raises:
        ValueError: impossible counts (with the prompt's index), an unknown shape, `cap` < 1.
    """
    one_of("shape", shape, ("auto", "u", "mirrored_j", "flat"))
    if not cap >= 1:
        raise ValueError(f"cap is {cap}: expected a weight >= 1")
    c, judged, histogram = _bins(correct, attempts)
    K = len(histogram) - 1
    found = _shape(histogram, heavy) if shape == "auto" else shape
    raised = torch.zeros(K + 1, dtype=torch.bool)
    if found != "flat":
        raised[1 if found == "u" else 0 : K] = True
    ends = histogram[~raised & (histogram > 0)]
    level = ends.min() if len(ends) else histogram.max()
    weight = torch.where(raised, (level / histogram.clamp(min=1)).clamp(1, cap), 1.0)
    return torch.where(judged, weight[c], 1.0).float()


def drop_easy_weights(correct: Int[Tensor, " P"], attempts: int | Int[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Return 0 for prompts that were always answered right, and 1 for all others, including those without a verdict.

    This is the filter of POLARIS (An et al., 2025), which the paper argues against (A.1); it is here for comparison.

    Raises:
        ValueError: impossible counts (with the prompt's index).
    """
    c, judged, histogram = _bins(correct, attempts)
    return torch.where(judged & (c == len(histogram) - 1), 0.0, 1.0)


def frontier_weights(correct: Int[Tensor, " P"], attempts: int | Int[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Return 4 p (1 - p), p the share of right answers: 1 where the student is right half of the time, 0 at both ends.

    This is the weighting of PACED (arXiv 2603.11178) with exponents of 1, for comparison. A prompt that could not be
    judged has the mean weight of the others (1 if there are none).

    Raises:
        ValueError: impossible counts (with the prompt's index).
    """
    _, judged, _ = _bins(correct, attempts)
    k = torch.as_tensor(attempts).clamp(min=1)
    p = correct / k
    weight = 4 * p * (1 - p)
    unknown = weight[judged].mean() if judged.any() else torch.tensor(1.0)
    return torch.where(judged, weight, unknown)


def difficulty_shape(correct: Int[Tensor, " P"], attempts: int | Int[Tensor, " P"], *, heavy: float = 1.5) -> Shape:
    """Return `u`, `mirrored_j` or `flat`: the shape of the histogram from never right (c = 0) to always right (c = K).

    An end is heavy if it holds more than one bin's equal share of the prompts, and at least `heavy` times the mean of
    the middle bins. If both ends are heavy, the shape is `u`; if only the easy end is, `mirrored_j`. Everything else,
    including K = 1, is `flat`. The paper names the shapes but gives no rule; this one is ours.

    Raises:
        ValueError: impossible counts (with the prompt's index).
    """
    return _shape(_bins(correct, attempts)[2], heavy)


def _shape(histogram: Tensor, heavy: float) -> Shape:
    if len(histogram) <= 2:
        return "flat"
    enough = heavy * histogram[1:-1].double().mean()
    hard, easy = (bool(n > histogram.double().mean() and n >= enough) for n in (histogram[0], histogram[-1]))
    if not easy:
        return "flat"
    return "u" if hard else "mirrored_j"


def _bins(correct: Tensor, attempts: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (bin of each prompt [P], true if it could be judged at all [P], histogram over the bins [K + 1])."""
    if isinstance(attempts, int):
        attempts = torch.full_like(correct, attempts)
    same_length(correct=correct, attempts=attempts)
    impossible = ~((correct >= 0) & (correct <= attempts))
    if impossible.any():
        i = first(impossible)
        raise ValueError(f"correct[{i}] is {correct[i]} of {attempts[i]} attempts: expected 0 to that many")
    K = int(attempts.max()) if len(attempts) else 0
    judged = attempts > 0
    nearest = (correct * K / attempts.clamp(min=1)).round().long()
    some_of_both = (correct > 0) & (correct < attempts)
    c = torch.where(some_of_both, nearest.clamp(1, max(1, K - 1)), nearest)  # the ends mean "never" and "always"
    return c, judged, torch.bincount(c[judged], minlength=K + 1)
