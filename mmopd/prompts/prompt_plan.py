"""The plan: an endless, exactly weighted sequence of (source, row), the same on every rank.

It has two independent parts, both without random state.

*Which source*: Tijdeman's algorithm for the chairman assignment problem (Discrete Mathematics 32, 1980). Every draw
adds its share of the weights to what each source is owed. The draw takes the source with the earliest deadline among
those that are owed enough. With K sources no count is ever further than 1 - 1/(2K - 2) from its share, so any window of
draws, whatever its length, is within 2 rows of its weights. The state is one number for each source: what it is owed.

*Which row of it*: epochs. In an epoch a row of weight w (relative to the source's mean) occurs floor(w) or ceil(w)
times: after E epochs its count is always within one of E * w. Without weights every row occurs once. The order of an
epoch is drawn from (seed, source, epoch), and spreads the copies of a row over the epoch. The state is two numbers:
epoch and position.

A row that cannot be used is replaced by the next row of its source, so that windows keep their composition. It is
counted by source and cause. Its place in the epoch is used up, so a resumed run continues after it.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmopd.errors import CheckpointError, ConfigError, DataError
from mmopd.prompts.rows import RowError

VERSION = 2
MAX_BAD = 100  # consecutive unusable rows after which the source counts as broken
SLACK = 1e-9  # rows; sums of shares are inexact, and one of two sources that are owed 1/2 each must qualify
ONE = 1 << 32  # row weights are fixed-point: sums of floats would let a weight of 1 skip a row

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rows:
    """A source as the plan sees it: number of rows, fingerprint of the content, and how often each row is wanted."""

    count: int
    fingerprint: str
    weights: Sequence[float] | None = None  # [count], relative to each other; all equal if not given


class PromptPlan:
    """Draws prompts by weight. Every rank makes the same plan and takes its share of what it draws.

    Args:
        sources: the sources by name.
        weights: weights of the sources, relative to each other; a source of weight 0 is not drawn.
        seed: seed of the order of the rows.

    Raises:
        DataError: a source has no rows.
        ConfigError: weights are negative, not finite, all zero or for other sources.
    """

    def __init__(self, sources: Mapping[str, Rows], weights: Mapping[str, float], seed: int) -> None:
        self._names = sorted(sources)
        self._seed = seed
        self._streams = {name: _Stream(name, sources[name], seed) for name in self._names}
        self._owed = np.zeros(len(self._names))
        self._weights = np.zeros(len(self._names))
        self.replaced: Counter[tuple[str, str]] = Counter()  # (source, cause) -> rows that could not be used
        self.reweight(weights)

    def reweight(self, weights: Mapping[str, float]) -> None:
        """Draw sources by these weights from the next draw on. A source that returns from 0 starts level, without a
        burst.

        Raises:
            ConfigError: the weights are refused, as in the class.
        """
        if wrong := set(weights) ^ set(self._names):
            raise ConfigError(
                f"the weights are for {sorted(weights)}, and the sources are {self._names}: "
                f"{sorted(wrong)} is in only one of them"
            )
        values = np.array([weights[name] for name in self._names], dtype=np.float64)
        if bad := [
            name for name, value in zip(self._names, values, strict=True) if not (value >= 0 and math.isfinite(value))
        ]:
            raise ConfigError(f"source {bad[0]!r}: its weight is {weights[bad[0]]}; it must be finite, and 0 or more")
        if not values.any():
            raise ConfigError(f"the weights of the sources {self._names} are all 0; one must be larger")
        if np.array_equal(values, self._weights):
            return
        self._weights = values
        self._share = values / values.sum()
        self._owed = self._level(self._owed)

    def draw(self, n: int) -> list[tuple[str, int]]:
        """Return the next n pairs (source, row)."""
        sources = [self._names[self._next_source()] for _ in range(n)]
        return [(source, self._streams[source].next()) for source in sources]

    def read(self, n: int, read: Callable[[str, int], T]) -> list[T]:
        """Return `read(source, row)` of the next n draws.

        A row that cannot be read is replaced by the next one of its source, and counted in `replaced`.

        Args:
            read: raises RowError or ValueError for a row that cannot be used; must do so on every rank, or on none.

        Raises:
            DataError: MAX_BAD consecutive rows of a source (or all its rows) cannot be used; names it and the
                last cause.
        """
        return [self._usable(self._names[self._next_source()], read) for _ in range(n)]

    def _usable(self, source: str, read: Callable[[str, int], T]) -> T:
        stream = self._streams[source]
        while True:
            row = stream.next()
            try:
                value = read(source, row)
            except (RowError, ValueError) as error:
                self.replaced[source, error.cause if isinstance(error, RowError) else "unusable"] += 1
                stream.bad += 1
                if stream.bad >= min(MAX_BAD, stream.count):
                    raise DataError(
                        f"source {source!r}: {stream.bad} consecutive rows cannot be used; the last one: {error}"
                    ) from None
            else:
                stream.bad = 0
                return value

    def replace(self, source: str, why: RowError, read: Callable[[str, int], T]) -> T:
        """Return `read(source, row)` of the next row in place of one that was drawn, and broke when it was used.

        Raises:
            DataError: as `read` does, or MAX_BAD consecutive rows of the source broke (or all its rows).
        """
        stream = self._streams[source]
        self.replaced[source, why.cause] += 1
        stream.broken += 1
        if stream.broken >= min(MAX_BAD, stream.count):
            raise DataError(f"source {source!r}: {stream.broken} consecutive rows cannot be used; the last one: {why}")
        return self._usable(source, read)

    def worked(self, source: str) -> None:
        """Report that a row of a source could be used to the end."""
        self._streams[source].broken = 0

    def epochs(self) -> dict[str, float]:
        """Return how many epochs of each source have been drawn."""
        return {name: stream.epochs() for name, stream in self._streams.items()}

    def state(self) -> dict[str, Any]:
        """Return the state of the plan for `restore`: a few numbers for each source, as JSON types."""
        replaced = {
            name: {cause: n for (source, cause), n in self.replaced.items() if source == name} for name in self._names
        }
        return {
            "version": VERSION,
            "seed": self._seed,
            "sources": {
                name: {
                    "weight": float(weight),
                    "owed": float(owed),
                    "replaced": replaced[name],
                    **self._streams[name].state(),
                }
                for name, weight, owed in zip(self._names, self._weights, self._owed, strict=True)
            },
        }

    def restore(self, state: Mapping[str, Any], change: Collection[str] = ()) -> None:
        """Continue where `state` was taken; the weights of the sources are those of the state.

        Args:
            change: sources that are added or removed on purpose. A new one starts level with the others, and all take
                the weights that this plan was made with.

        Raises:
            CheckpointError: the state has another version or seed, or other sources.
            DataError: the content or the row weights of a source differ.
        """
        for key, mine in (("version", VERSION), ("seed", self._seed)):
            if state[key] != mine:
                raise CheckpointError(
                    f"the plan's {key} is {mine}, but the checkpoint's is {state[key]}: this run cannot be continued"
                )
        kept: Mapping[str, Mapping[str, Any]] = state["sources"]
        changed = set(kept) ^ set(self._names)
        if wrong := changed ^ set(change):
            was = f"the sources were {sorted(kept)} and are now {self._names}"
            raise CheckpointError(
                f"{was}: {sorted(wrong)} "
                f"{'was added or removed' if wrong & changed else 'was neither added nor removed'}"
            )
        for name in set(kept) & set(self._names):
            self._streams[name].restore(kept[name])
        if not changed:
            self.reweight({name: kept[name]["weight"] for name in self._names})
        owed = np.array([kept[name]["owed"] if name in kept else 0.0 for name in self._names])
        self._owed = self._level(owed) if changed else owed
        self.replaced = Counter(
            {(name, cause): n for name in self._names for cause, n in kept.get(name, {}).get("replaced", {}).items()}
        )

    def _level(self, owed: NDArray[np.float64]) -> NDArray[np.float64]:
        """Shift what is owed so that it sums to zero over the sources that are drawn."""
        live = self._weights > 0
        return np.where(live, owed - owed[live].mean(), 0.0)

    def _next_source(self) -> int:
        """Return the index of the source with the earliest deadline among those owed enough (Tijdeman 1980, sec. 2)."""
        self._owed += self._share
        live = self._share > 0
        least = 1 / max(2, 2 * int(np.count_nonzero(live)) - 2)
        may = live & (self._owed >= least - SLACK)
        deadline = np.divide(1 - least - self._owed, self._share, out=np.full_like(self._owed, np.inf), where=may)
        chosen = int(np.argmin(deadline))
        self._owed[chosen] -= 1
        return chosen


class _Stream:
    """The endless sequence of rows of one source."""

    def __init__(self, name: str, rows: Rows, seed: int) -> None:
        if rows.count < 1:
            raise DataError(f"source {name!r} has no rows")
        self._name = name
        self._seed = seed
        self._fingerprint = rows.fingerprint
        self.count = rows.count
        self.bad = 0  # consecutive rows that could not be read
        self.broken = 0  # consecutive rows that could be read, and broke when they were used
        self._weights = None if rows.weights is None else _fixed_point(name, rows.count, rows.weights)
        self._epoch = 0
        self._position = 0
        self._order = self._order_of(0)

    def next(self) -> int:
        if self._position == len(self._order):
            self._epoch += 1
            self._position = 0
            self._order = self._order_of(self._epoch)
        self._position += 1
        return int(self._order[self._position - 1])

    def epochs(self) -> float:
        return self._epoch + self._position / len(self._order)

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "position": self._position,
            "fingerprint": self._fingerprint,
            "row_weights": None if self._weights is None else hashlib.sha256(self._weights.tobytes()).hexdigest(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        for key, what in (("fingerprint", "content"), ("row_weights", "difficulty weights")):
            if state[key] != self.state()[key]:
                raise DataError(
                    f"source {self._name!r}: its {what} changed since the checkpoint: this run cannot be continued on "
                    "it"
                )
        self._epoch = state["epoch"]
        self._position = state["position"]
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> NDArray[np.int32]:
        """Return the rows of an epoch in order, each as often as it is due."""
        start = self._random(epoch).random(self.count)
        if self._weights is None:
            return np.argsort(start, kind="stable").astype(np.int32)
        phase = (self._random("phase").random(self.count) * ONE).astype(np.int64)
        fraction = self._weights % ONE
        copies = self._weights // ONE + ((epoch * fraction + phase) % ONE + fraction) // ONE
        rows = np.repeat(np.arange(self.count, dtype=np.int32), copies)
        copy = np.arange(len(rows)) - np.repeat(np.cumsum(copies) - copies, copies)
        return np.take(rows, np.argsort((copy + start[rows]) / copies[rows], kind="stable"))

    def _random(self, what: object) -> np.random.Generator:
        digest = hashlib.sha256(repr((self._seed, self._name, what)).encode()).digest()
        return np.random.Generator(np.random.PCG64(int.from_bytes(digest)))


def _fixed_point(name: str, count: int, given: Sequence[float]) -> NDArray[np.int64]:
    """Return row weights relative to their mean, in units of 1 / ONE."""
    weights = np.asarray(given, dtype=np.float64)
    if weights.shape != (count,):
        raise DataError(f"source {name!r}: {len(weights)} row weights for {count} rows; measure its difficulty again")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise DataError(f"source {name!r}: row weights must be finite, 0 or more, and not all 0")
    fixed: NDArray[np.int64] = np.rint(weights / weights.mean() * ONE).astype(np.int64)
    return fixed
