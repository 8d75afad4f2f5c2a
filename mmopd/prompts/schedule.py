"""Weights of the sources at each step: the mixture's schedule, adapted to how often the student is right in each."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mmopd.config import Mixture

MEMORY = 0.9  # share of a source's running mean that remains after a step with outcomes of it


class Schedule:
    """Source weights for `PromptPlan.reweight`, adapted to the outcomes of the rollouts.

    The weight of a source is its weight in the mixture at the step, times `(1 - a) + a * 4 p (1 - p)`: p is the running
    mean of its outcomes, a is the mixture's `adapt`. Sources that are all right or all wrong teach least. A source
    without outcomes keeps its weight.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._right: dict[str, float] = {}  # source -> running mean of its outcomes

    def weights(self, step: int) -> dict[str, float]:
        """Return source -> weight at a step, for `PromptPlan.reweight`."""
        return {name: source.weight_at(step) * self._preference(name) for name, source in self._mixture.sources.items()}

    def observe(self, outcomes: Iterable[tuple[str, float]]) -> None:
        """Record the outcomes of a step: (source, value), NaN for unknown. Every rank must get the same outcomes."""
        known: dict[str, list[float]] = {}
        for source, value in outcomes:
            if not math.isnan(value):
                known.setdefault(source, []).append(value)
        for source, values in sorted(known.items()):
            mean = math.fsum(values) / len(values)
            self._right[source] = MEMORY * self._right.get(source, mean) + (1 - MEMORY) * mean

    def state(self) -> dict[str, Any]:
        """Return the state for `restore`: one number for each source, as JSON types."""
        return dict(self._right)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken; sources that are no longer in the mixture are dropped."""
        self._right = {name: float(mean) for name, mean in state.items() if name in self._mixture.sources}

    def _preference(self, source: str) -> float:
        right = self._right.get(source)
        return 1.0 if right is None else 1 - self._mixture.adapt * (1 - 4 * right * (1 - right))
