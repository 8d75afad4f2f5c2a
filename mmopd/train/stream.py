"""The prompts of a run, step by step: the mixture's plan with its schedule, inside a source by difficulty. All ranks
draw the same.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmopd import catalog
from mmopd.config import Recipe
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.prompts import difficulty_counts
from mmopd.prompts.plan import Plan, Rows
from mmopd.prompts.schedule import Schedule
from mmopd.prompts.shards import Shards, open_mixture
from mmopd.prompts.tokens import hash_processor
from mmopd.records import Encoded, Sample
from mmopd.runtime.run_folder import RunFolder
from mmopd.task.load import load_tasks
from mmopd.train.distributed import Ranks


class Stream:
    """An endless stream of prompts, read and encoded.

    Attributes:
        sources: of the mixture, by name.

    Raises:
        UserError: a source cannot be opened, or its difficulty was not measured.
    """

    def __init__(self, recipe: Recipe, run: RunFolder, encoder: Encoder) -> None:
        mixture = catalog.load_mixture(recipe.mixture)
        self._n, self._encoder = recipe.rollout.prompts, encoder
        self.sources: Mapping[str, Shards] = open_mixture(
            mixture, load_tasks(), Path.cwd(), hash_processor(recipe.student.model)
        )
        measured = (
            difficulty_counts.load(run.difficulty / difficulty_counts.FILE) if recipe.algorithm.difficulty else {}
        )
        rows = {
            name: Rows(len(shards), shards.fingerprint, measured[name].weights if measured else None)
            for name, shards in self.sources.items()
        }
        self._schedule = Schedule(mixture)
        self._plan = Plan(rows, self._schedule.weights(0), recipe.seed)

    def draw(self, step: int) -> list[Encoded]:
        """The prompts of a step, by group; each step once, in order."""
        self._plan.reweight(self._schedule.weights(step))
        return self._plan.read(self._n, lambda name, row: self._encoder.encode(self.sources[name][row]))

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
            raise UserError(
                "a row could be read on one rank and not on another: all ranks must see the same shards, whole"
            )

    def metrics(self) -> dict[str, float]:
        """How often each source has been gone through, and how many of its rows could not be used."""
        bad = Counter[str]()
        for (name, _), rows in self._plan.replaced.items():
            bad[name] += rows
        epochs = {f"epoch/{name}": times for name, times in self._plan.epochs().items()}
        return epochs | {f"replaced/{name}": float(n) for name, n in bad.items()}
