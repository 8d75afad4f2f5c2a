"""Where the samples of a step come from: the student's rollouts, scored and verified; for SFT the answers that its teachers gave."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import chain
from types import TracebackType
from typing import Self

from mmopd import catalog
from mmopd.config import Dense, Recipe
from mmopd.modality import Encoder
from mmopd.prompts.shards import Shards
from mmopd.records import Encoded, Sample
from mmopd.rollout.answers import Library
from mmopd.rollout.collect import collect
from mmopd.rollout.engine import StudentEngine
from mmopd.run import RunFolder
from mmopd.task.base import Task
from mmopd.task.pool import VerifierPool
from mmopd.teacher.cache import ScoreCache
from mmopd.teacher.client import Scorer
from mmopd.teacher.router import load_teachers, references
from mmopd.train.distributed import Ranks


class Rollouts:
    """The samples of all ranks, step by step. An async context manager; it lives in one event loop.

    Attributes:
        engine: the student's.
        kept: scores since the last checkpoint.

    Raises:
        UserError: a prompt has no teacher, a teacher no endpoint, or (SFT) its answers are not there.
    """

    def __init__(self, run: RunFolder, recipe: Recipe, sources: Mapping[str, Shards], encoder: Encoder, ranks: Ranks) -> None:
        self._recipe, self._ranks = recipe, ranks
        student, teachers = run.read_endpoints()
        tasks: Mapping[str, Task] = catalog.load_tasks()
        fleet, objective = load_teachers(recipe), recipe.algorithm.objective
        self.engine = StudentEngine(student, encoder)
        self.kept = ScoreCache(run.scores, ranks.rank)
        self._library = Library(recipe, sources, encoder) if objective.kind == "sft" else None
        self._scorers: dict[str, Scorer] = {}
        if objective.kind not in {"grpo", "sft"}:
            top_k = objective.top_k if isinstance(objective, Dense) else 0
            self._scorers["scorer"] = Scorer(fleet, tasks, teachers, encoder, top_k=top_k, kept=self.kept)
        if before := references(fleet, objective):
            self._scorers["reference"] = Scorer(before, tasks, teachers, encoder, kept=self.kept)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self.engine)
            for scorer in self._scorers.values():
                await stack.enter_async_context(scorer)
            stack.enter_context(self.kept)
            self._verifiers = stack.enter_context(VerifierPool())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stack.aclose()

    async def step(self, step: int, prompts: Sequence[Encoded]) -> tuple[list[Sample], Counter[str]]:
        """The samples in order of their groups, the same list on all ranks and however many there are; and what scoring them took."""
        share, spent = list(enumerate(prompts))[self._ranks.rank :: self._ranks.size], self._counts()
        if self._library is not None:
            mine = [sample for number, encoded in share for sample in self._library.samples(number, encoded, step)]
        else:
            mine = await collect(share, recipe=self._recipe, step=step, engine=self.engine, verifiers=self._verifiers, **self._scorers)
        parts = self._ranks.gather_objects((mine, self._counts() - spent))
        samples = sorted(chain.from_iterable(samples for samples, _ in parts), key=lambda sample: sample.group)
        return samples, sum((counts for _, counts in parts), Counter[str]())

    def _counts(self) -> Counter[str]:
        """What the scorers have counted so far, together."""
        return sum((scorer.counts for scorer in self._scorers.values()), Counter[str]())
