"""Outcome-guided margin calibration (paper 3.4, A.4): the margin by which a teacher ranks right above wrong.

The margin of a group is `mean R(Y+) - mean R(Y-)`, or `min R(Y+) - max R(Y-)` (Eq. 9); the criterion is `margin >=
delta` (Eq. 10). Scope `group` takes each prompt's responses, scope `global` the whole batch as one group. A group
without both outcomes has no margin and passes unchanged. An unknown outcome (NaN) is on neither side: it is not
counted, and its response is neither shifted nor masked.

All results are functions of the values alone: sums run over sorted returns, so neither the order of the responses nor
their rank changes a bit (except which of two responses with the same return the mask drops).

N responses, S groups, W responses of the largest side, D drops.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmopd.algorithm.groups import at_least_zero, first, one_of, places, rows, same_length, sides

Scope = Literal["group", "global"]
Mode = Literal["mean", "minmax"]
Direction = Literal["lift", "suppress", "spread"]

# Shares of s that right responses gain and wrong ones lose.
MOVES = {"lift": (1.0, 0.0), "suppress": (0.0, 1.0), "spread": (0.5, 0.5)}


def margin_shift(
    returns: Float[Tensor, " N"],
    outcome: Float[Tensor, " N"],
    group: Int[Tensor, " N"],
    *,
    scope: Scope,
    mode: Mode,
    direction: Direction,
    delta: float,
    threshold: float = 0.5,
) -> Float[Tensor, " N"]:
    """Return the shift of every token of each response, such that its group's margin is at least `delta` (Eq. 11, 12).

    `s = max(0, delta - margin)`: `lift` adds s to every right response, `suppress` subtracts s from every wrong one,
    `spread` does half of each. A return is a mean over tokens, so the same number moves the return by as much; the
    order within a side stays.

    Args:
        returns: mean token reward of each response, in nats (Eq. 5).
        outcome: 1 right, 0 wrong, between cut at `threshold`, NaN unknown.
        group: number of the response's prompt.
        scope: whose margin counts, each prompt's or the batch's.
        mode: margin of the means, or of the worst right and the best wrong response.
        direction: which side moves.
        delta: margin to reach, in nats.
        threshold: a soft outcome at or above it is right.

    Raises:
        ValueError: a return that is NaN or infinite, an outcome outside 0..1 (both with the index), lengths that
            differ, `delta` < 0.
    """
    one_of("direction", direction, MOVES)
    pos, neg = _both_sides(returns, outcome, group, scope=scope, mode=mode, delta=delta, threshold=threshold)
    s = (delta - pos.whole - neg.whole).nan_to_num(nan=0.0).clamp(min=0)
    up, down = MOVES[direction]
    shift = torch.zeros_like(returns)
    shift[pos.index] += (up * s[pos.row]).to(returns.dtype)
    shift[neg.index] -= (down * s[neg.row]).to(returns.dtype)
    return shift


def margin_mask(
    returns: Float[Tensor, " N"],
    outcome: Float[Tensor, " N"],
    group: Int[Tensor, " N"],
    *,
    scope: Scope,
    mode: Mode,
    delta: float,
    retain: float,
    threshold: float = 0.5,
) -> Bool[Tensor, " N"]:
    """Return which responses to keep, True = keep, so that their group's margin rises to `delta` (Algorithm 1, greedy).

    The worst right and the best wrong responses are dropped one at a time, each time the one that raises the margin
    more (a tie drops the right one), until the margin holds or no drop raises it. A side stops at its floor, `max(1,
    floor(n * retain))` of its n responses. Values that differ only by the rounding of the returns' dtype count as
    equal. If responses have the same return, the later one is dropped first.

    Args and errors are those of `margin_shift`; `retain` is a share, 0..1.
    """
    if not 0 <= retain <= 1:
        raise ValueError(f"retain is {retain}: expected a share, 0 to 1")
    pos, neg = _both_sides(returns, outcome, group, scope=scope, mode=mode, delta=delta, threshold=threshold)
    margin = (pos.whole + neg.whole)[:, None]
    rounding = 4 * torch.finfo(returns.dtype).eps * torch.maximum(pos.scale, neg.scale)[:, None]

    gain_pos = pos.gains(retain)
    gain_neg = neg.gains(retain)
    # Taking the better of the two next drops each time merges two lists. An entry that beats the one before it in its
    # own list is taken right after it, so the merged order is that of the running minima. The sort is stable, so a tie
    # takes the right response.
    running = torch.cat([gain_pos.cummin(1).values + rounding, gain_neg.cummin(1).values], 1)
    order = running.argsort(stable=True, dim=1, descending=True)
    gain = torch.cat([gain_pos, gain_neg], 1).gather(1, order)
    before = margin + gain.cumsum(1).roll(1, 1).index_fill(1, torch.tensor(0), 0.0)  # [S, D] margin before each drop
    go = (before < delta - rounding) & (gain > rounding)  # false where there is no margin: it is NaN
    go = go.int().cumprod(1).bool()  # the first refusal ends it

    of_pos = order < gain_pos.shape[1]
    keep = torch.ones_like(outcome, dtype=torch.bool)
    for side, dropped in ((pos, go & of_pos), (neg, go & ~of_pos)):
        keep[side.index] = side.place < (side.count - dropped.sum(1))[side.row]
    return keep


def margins(
    returns: Float[Tensor, " N"],
    outcome: Float[Tensor, " N"],
    group: Int[Tensor, " N"],
    *,
    scope: Scope,
    mode: Mode,
    threshold: float = 0.5,
) -> Float[Tensor, " S"]:
    """Return the margins of the groups that have both outcomes, by group number, in nats; float64.

    Args and errors are those of `margin_shift`.
    """
    pos, neg = _both_sides(returns, outcome, group, scope=scope, mode=mode, delta=0.0, threshold=threshold)
    margin = pos.whole + neg.whole
    return margin[~margin.isnan()]


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of every group, each group's responses sorted best first: highest return if right, lowest if wrong.

    Returns of the wrong side are negated, so that on both sides more is better and a margin is a sum.
    """

    index: Int[Tensor, " n"]  # the responses of this side
    row: Int[Tensor, " n"]
    place: Int[Tensor, " n"]  # 0 = best of its group
    count: Int[Tensor, " S"]
    best: Float[Tensor, "S W"]  # statistic (mean or minimum) of the best 1, 2, ... W; meaningless past `count`
    scale: Float[Tensor, " S"]  # largest |return|

    @property
    def whole(self) -> Float[Tensor, " S"]:
        """The statistic of all responses; NaN where the side is empty."""
        value = self.best.gather(1, (self.count - 1).clamp(min=0)[:, None])[:, 0]
        return value.masked_fill(self.count == 0, math.nan)

    def gains(self, retain: float) -> Float[Tensor, "S D"]:
        """Return how much the 1st, 2nd, ... drop raises the statistic; -inf where the floor forbids it."""
        floor = (self.count.double() * retain + 1e-9).floor().long().clamp(min=1)  # 1e-9: 0.29 * 100 is 28.999...
        drop = torch.arange(self.best.shape[1])
        left = (self.count[:, None] - drop - 2).clamp(min=0)
        gain = self.best.gather(1, left) - self.best.gather(1, (left + 1).clamp(max=self.best.shape[1] - 1))
        return gain.masked_fill(drop >= (self.count - floor)[:, None], -math.inf)


def _both_sides(
    returns: Tensor, outcome: Tensor, group: Tensor, *, scope: str, mode: str, delta: float, threshold: float
) -> tuple[_Side, _Side]:
    """Check the arguments, and return (right, wrong); the margins are the sum of the two `whole`."""
    same_length(returns=returns, outcome=outcome, group=group)
    one_of("scope", scope, ("group", "global"))
    one_of("mode", mode, ("mean", "minmax"))
    at_least_zero("delta", delta)
    if math.isinf(delta):
        raise ValueError("delta is infinite: no shift reaches it")
    finite = returns.isfinite()
    if not finite.all():
        i = first(~finite)
        raise ValueError(
            f"returns[{i}] is {returns[i]:g}: a response without a score is left out before, it has no return"
        )
    row, groups = rows(group if scope == "group" else torch.zeros_like(group))
    right, wrong = sides(outcome, threshold)
    exact = returns.double()
    return _side(exact, right, row, groups=groups, mode=mode), _side(-exact, wrong, row, groups=groups, mode=mode)


def _side(value: Tensor, member: Tensor, row: Tensor, *, groups: int, mode: str) -> _Side:
    index = member.nonzero()[:, 0]
    index = index[value[index].argsort(descending=True, stable=True)]
    index = index[row[index].argsort(stable=True)]
    row = row[index]
    count, place = places(row, groups)
    W = max([1, *count.tolist()])
    table = torch.zeros(groups, W, dtype=value.dtype)
    table[row, place] = value[index]
    best = table.cumsum(1) / torch.arange(1, W + 1) if mode == "mean" else table
    return _Side(index, row, place, count, best, table.abs().amax(1))
