"""The prompts of a run, step by step: the mixture's plan with its schedule, inside a source by difficulty. All ranks
draw the same.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mmopd.config import Mixture
from mmopd.errors import DataError
from mmopd.modality import Encoder
from mmopd.prompts.difficulty_counts import Measured
from mmopd.prompts.prompt_plan import PromptPlan, Rows
from mmopd.prompts.schedule import Schedule
from mmopd.prompts.shards import Shards
from mmopd.records import Encoded, Sample
from mmopd.train.distributed import Ranks


class Stream:
    """An endless stream of prompts, read and encoded.

    Args:
        mixture: gives the sources their weights, step by step.
        sources: of the mixture, by name.
        encoder: the student's.
        prompts: of a step.
        seed: of the run.
        measured: the difficulty of each source; None where it has no part in the draws.
    """

    def __init__(
        self,
        mixture: Mixture,
        sources: Mapping[str, Shards],
        encoder: Encoder,
        *,
        prompts: int,
        seed: int,
        measured: Mapping[str, Measured] | None,
    ) -> None:
        self.sources = sources
        self._prompts = prompts
        self._encoder = encoder
        rows = {
            name: Rows(len(shards), shards.fingerprint, measured[name].weights if measured else None)
            for name, shards in sources.items()
        }
        self._schedule = Schedule(mixture)
        self._plan = PromptPlan(rows, self._schedule.weights(0), seed)

    def draw(self, step: int) -> list[Encoded]:
        """The prompts of a step, by group; each step once, in order."""
        self._plan.reweight(self._schedule.weights(step))
        return self._plan.read(self._prompts, lambda name, row: self._encoder.encode(self.sources[name][row]))

    def observe(self, prompts: Sequence[Encoded], samples: Sequence[Sample]) -> None:
        """What came of a step, for weights that adapt to it."""
        self._schedule.observe((prompts[s.group].prompt.key.rpartition("/")[0], s.outcome.value) for s in samples)

    def state(self) -> dict[str, Any]:
        """Where it stands, for `restore`, ready for json."""
        return {"plan": self._plan.state(), "schedule": self._schedule.state()}

    def restore(self, state: Mapping[str, Any], change: Collection[str]) -> None:
        """Go on where `state` was taken.

        Args:
            change: sources that were added to the mixture or removed from it on purpose.

        Raises:
            UserError: a source has changed otherwise.
        """
        self._plan.restore(state["plan"], change=change)
        self._schedule.restore(state["schedule"])

    def check_same(self, ranks: Ranks) -> None:
        """All ranks have drawn the same rows. Collective.

        Raises:
            UserError: a row could be read on one rank and not on another.
        """
        if len(set(ranks.gather_objects(sum(self._plan.replaced.values())))) > 1:
            raise DataError(
                "a row could be read on one rank and not on another: all ranks must see the same shards, whole"
            )

    def metrics(self) -> dict[str, float]:
        """How often each source has been gone through, and how many of its rows could not be used."""
        bad = Counter[str]()
        for (name, _), rows in self._plan.replaced.items():
            bad[name] += rows
        epochs = {f"epoch/{name}": times for name, times in self._plan.epochs().items()}
        return epochs | {f"replaced/{name}": float(n) for name, n in bad.items()}
