"""The weights of the sources at each step: as the mixture schedules them, and by how the student fares in each."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mmopd.config import Mixture

MEMORY = 0.9  # how much of what was known of a source outlives a step in which it was drawn


class Schedule:
    """Gives `PromptPlan.reweight` its weights, and is told how the rollouts ended.

    A source's weight is that of the mixture at the step, times `(1 - a) + a * 4 p (1 - p)`, where p is the running mean
    of its outcomes and a the mixture's `adapt`: sources that are all right or all wrong teach least. Without outcomes a
    source keeps its weight.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._right: dict[str, float] = {}  # source -> running mean of its outcomes

    def weights(self, step: int) -> dict[str, float]:
        """Source -> weight at a step, for `PromptPlan.reweight`."""
        return {name: source.weight_at(step) * self._preference(name) for name, source in self._mixture.sources.items()}

    def observe(self, outcomes: Iterable[tuple[str, float]]) -> None:
        """Take the outcomes of a step: (source, value), NaN for unknown. All ranks must be told the same."""
        known: dict[str, list[float]] = {}
        for source, value in outcomes:
            if not math.isnan(value):
                known.setdefault(source, []).append(value)
        for source, values in sorted(known.items()):
            mean = math.fsum(values) / len(values)
            self._right[source] = MEMORY * self._right.get(source, mean) + (1 - MEMORY) * mean

    def state(self) -> dict[str, Any]:
        """For `restore`: a number for each source, ready for json."""
        return dict(self._right)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken; sources that are not in the mixture any more are forgotten."""
        self._right = {name: float(mean) for name, mean in state.items() if name in self._mixture.sources}

    def _preference(self, source: str) -> float:
        right = self._right.get(source)
        return 1.0 if right is None else 1 - self._mixture.adapt * (1 - 4 * right * (1 - right))
