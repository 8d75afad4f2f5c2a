"""Online balancing of right and wrong responses (paper 3.3, A.2): which responses of a step to keep.

A draw is a hash of (seed, group number, number of the response in its group), not a stream of random numbers: it
depends neither on the order of the groups nor on the rank that computes it. N responses, S groups.
"""

import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from mmopd.algorithm.groups import at_least_zero, one_of, places, rows, same_length, sides


def balance_online(
    outcome: Float[Tensor, " N"],
    group: Int[Tensor, " N"],
    *,
    scope: Literal["group", "batch"],
    ratio: float,
    tolerance: float,
    seed: int,
    key: Int[Tensor, " N"] | None = None,
    threshold: float = 0.5,
) -> Bool[Tensor, " N"]:
    """Drop random responses of the over-represented side. True = keep. Unknown outcomes are kept, and not counted.

    Scope `group` cuts each group that has both outcomes to right : wrong = `ratio`, rounded to the nearest whole number
    and never to none, so that the group keeps its margin. Two ratios select one side: in such a group, 0 keeps only the
    wrong and infinity only the right responses. Groups with one outcome stay whole, at any ratio.

    Scope `batch` balances the share of right ones among all. If it is outside `ratio / (1 + ratio)` +- `tolerance`, the
    fewest responses are dropped that bring it inside, or, if no number of drops does, to the nearest point. Each group
    loses in proportion to what it has of that side (to one response). A batch with one outcome stays whole.

    The number of right and wrong responses that a group keeps depends on (outcomes, seed) alone. The choice of the
    responses also depends on `key`.

    Args:
        outcome: 1 right, 0 wrong, between cut at `threshold`, NaN unknown.
        group: number of the response's prompt, unique over all ranks.
        scope: what is balanced, each prompt's responses or the batch.
        ratio: right : wrong to reach, 0 to infinity.
        tolerance: allowed distance of the share (scope `batch`), 0..1.
        seed: of the run and the step, so that a resumed run drops the same responses.
        key: number of the response inside its group. Without it, the position among the group's responses is used: the
            result then does not change when whole groups move, but it does when a group's own responses change places.
        threshold: a soft outcome at or above it is right.

    Raises:
        ValueError: an outcome outside 0..1 (with its index), `ratio` < 0, `tolerance` outside 0..1, a key twice in a
            group.
    """
    same_length(outcome=outcome, group=group)
    one_of("scope", scope, ("group", "batch"))
    at_least_zero("ratio", ratio)
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance is {tolerance}: expected a share, 0 to 1")
    right, wrong = sides(outcome, threshold)
    row, groups = rows(group)
    offset, draw = _draws(seed, group, _position(row, groups) if key is None else _unique_in_group(key, group))

    n_right, n_wrong = (torch.bincount(row[side], minlength=groups) for side in (right, wrong))
    inverse = math.inf if ratio == 0 else 1 / ratio
    keep = torch.ones_like(right)
    for side, have, other, aim in ((right, n_right, n_wrong, ratio), (wrong, n_wrong, n_right, inverse)):
        index = side.nonzero()[:, 0]
        index = index[draw[index].argsort(stable=True)]
        index = index[row[index].argsort(stable=True)]
        place = places(row[index], groups)[1]  # a random order inside each group
        if scope == "group":
            keep[index] = place < _quota(have, other, aim)[row[index]]
        else:
            drops = int(have.sum()) - _nearest(int(have.sum()), int(other.sum()), aim, tolerance)
            # Evenly over 0..1 in every group, so that a prefix takes each group's share.
            spread = (place + offset[index]) / have[row[index]]
            keep[index[spread.argsort(stable=True)[:drops]]] = False
    return keep


def _quota(have: Tensor, other: Tensor, aim: float) -> Tensor:
    """Return how many responses of a side each group keeps, to reach have : other = aim; [S]."""
    if aim == 0:
        return torch.where(other > 0, 0, have)
    wanted = (other * aim + 0.5).floor().clamp(min=1) if math.isfinite(aim) else have
    return torch.where(other > 0, torch.minimum(have, wanted), have)


def _nearest(have: int, other: int, aim: float, tolerance: float) -> int:
    """Return the largest number of a side to keep whose share of all is nearest to aim / (1 + aim) +- tolerance."""
    if other == 0:
        return have
    share = 1.0 if math.isinf(aim) else aim / (1 + aim)
    kept = np.arange(have, -1, -1)
    distance = np.maximum(np.abs(kept / (kept + other) - share) - tolerance, 0)
    distance[distance < 1e-12] = 0  # in floating point 0.55 - 0.5 is more than 0.05
    return int(kept[distance.argmin()])


def _position(row: Tensor, groups: int) -> Tensor:
    """Return the position of each response among those of its group, in the order given."""
    order = row.argsort(stable=True)
    return torch.empty_like(row).scatter_(0, order, places(row[order], groups)[1])


def _unique_in_group(key: Tensor, group: Tensor) -> Tensor:
    same_length(key=key, group=group)
    pairs, times = torch.unique(torch.stack([group, key], 1), dim=0, return_counts=True)
    if (times > 1).any():
        g, k = pairs[times > 1][0].tolist()
        raise ValueError(f"key {k} is in group {g} more than once: it numbers the responses of a group")
    return key


def _draws(seed: int, group: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return two numbers in [0, 1) per response, float64 [N]: one that its group shares, and its own."""
    start = np.full(len(group), seed % 2**64, dtype=np.uint64)
    of_group = _mix(_mix(start) ^ group.numpy().astype(np.uint64))
    own = _mix(of_group ^ key.numpy().astype(np.uint64))
    return _unit(of_group), _unit(own)


def _unit(bits: NDArray[np.uint64]) -> Tensor:
    """Return the upper 53 bits as a number in [0, 1)."""
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return one step of SplitMix64 (Steele, Lea, Flood 2014).

    It is a bijection of 64 bits in which every input bit affects every output bit.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
