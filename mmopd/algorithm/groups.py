"""Common parts of margins and balancing: the side of a response, and its group as a row number.

N responses, S groups.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def sides(outcome: Float[Tensor, " N"], threshold: float) -> tuple[Bool[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return (right, wrong); soft outcomes are cut at `threshold` (paper A.3), an unknown one (NaN) is on neither side.

    Raises:
        ValueError: an outcome outside 0..1, with its index, or such a threshold.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}: expected an outcome, 0 to 1")
    outside = (outcome < 0) | (outcome > 1)
    if outside.any():
        raise ValueError(f"outcome[{first(outside)}] is {outcome[outside][0]:g}: expected 0 to 1, or NaN for unknown")
    return outcome >= threshold, outcome < threshold


def rows(group: Int[Tensor, " N"]) -> tuple[Int[Tensor, " N"], int]:
    """Return the groups numbered 0..S-1 in order of their ids, and S."""
    ids, row = torch.unique(group, return_inverse=True)
    return row, len(ids)


def places(row: Int[Tensor, " N"], groups: int) -> tuple[Int[Tensor, " S"], Int[Tensor, " N"]]:
    """Return (responses in each row [S], place of each among those of its row, from 0 [N]); `row` is sorted."""
    count = torch.bincount(row, minlength=groups)
    return count, torch.arange(len(row)) - (count.cumsum(0) - count)[row]


def first(where: Bool[Tensor, " N"]) -> int:
    """Return the index of the first true entry."""
    return int(where.nonzero()[0])


def same_length(**arrays: Tensor) -> None:
    """Raise ValueError unless all arrays are one-dimensional and have the same length."""
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"expected arrays of one dimension and one length, got {shapes}")


def one_of(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(known)}")


def at_least_zero(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a number >= 0; infinity passes."""
    if not value >= 0:
        raise ValueError(f"{name} is {value}: expected a number >= 0")
