"""Draw the prompts of a run, step by step: sources by schedule, rows by difficulty. All ranks draw the same."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mmopd.config import Mixture
from mmopd.errors import DataError
from mmopd.modality import Encoder
from mmopd.prompts.measured import Measured
from mmopd.prompts.prompt_plan import PromptPlan, Rows
from mmopd.prompts.rows import RowError
from mmopd.prompts.schedule import Schedule
from mmopd.prompts.shards import Shards
from mmopd.records import Encoded, Sample
from mmopd.train.distributed import Ranks


class Stream:
    """An endless stream of prompts, read and encoded.

    Args:
        mixture: gives each source its weight in each step.
        sources: of the mixture, by name.
        encoder: the student's.
        prompts: number per step.
        seed: of the run.
        measured: the difficulty of each source; None if draws ignore it.
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
        """Return the prompts of a step, by group; call it once for each step, in order."""
        self._plan.reweight(self._schedule.weights(step))
        return self._plan.read(self._prompts, self._read)

    def replace(self, asked: Mapping[int, Encoded], refused: Mapping[int, RowError]) -> dict[int, Encoded]:
        """Return the next prompt of the same source for each prompt that cannot be used; they are counted.

        Args:
            asked: prompts by group, with those that cannot be used.
            refused: why, by group; the same on every rank.

        Raises:
            DataError: too many consecutive rows of a source cannot be used; names it and the last cause.
        """
        source_of = {group: encoded.prompt.key.rpartition("/")[0] for group, encoded in asked.items()}
        for source in {source for group, source in source_of.items() if group not in refused}:
            self._plan.worked(source)
        return {group: self._plan.replace(source_of[group], why, self._read) for group, why in sorted(refused.items())}

    def _read(self, name: str, row: int) -> Encoded:
        return self._encoder.encode(self.sources[name][row])

    def observe(self, prompts: Sequence[Encoded], samples: Sequence[Sample]) -> None:
        """Report the outcomes of a step, for weights that adapt to them."""
        self._schedule.observe((prompts[s.group].prompt.key.rpartition("/")[0], s.outcome.value) for s in samples)

    def state(self) -> dict[str, Any]:
        """Return the position in the stream for `restore`, ready for json."""
        return {"plan": self._plan.state(), "schedule": self._schedule.state()}

    def restore(self, state: Mapping[str, Any], change: Collection[str]) -> None:
        """Go on from where `state` was taken.

        Args:
            change: sources that were added to or removed from the mixture on purpose.

        Raises:
            CheckpointError: sources were added or removed in another way.
            DataError: the content of a source has changed.
        """
        self._plan.restore(state["plan"], change=change)
        self._schedule.restore(state["schedule"])

    def check_same(self, ranks: Ranks) -> None:
        """Check that all ranks have drawn the same rows. Collective.

        Raises:
            DataError: a row could be read on one rank and not on another.
        """
        if len(set(ranks.gather_objects(sum(self._plan.replaced.values())))) > 1:
            raise DataError(
                "a row could be read on one rank and not on another: all ranks must see the same complete shards"
            )

    def metrics(self) -> dict[str, float]:
        """Return how many epochs of each source were drawn, and how many of its rows could not be used."""
        bad = Counter[str]()
        for (name, _), rows in self._plan.replaced.items():
            bad[name] += rows
        epochs = {f"epoch/{name}": times for name, times in self._plan.epochs().items()}
        return epochs | {f"replaced/{name}": float(n) for name, n in bad.items()}
