"""Provide the samples of a step: the student's rollouts, scored and verified, or for SFT the teachers' answers."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import chain
from types import TracebackType
from typing import Any, NamedTuple, Self

from mmopd.algorithm.settings import Algorithm
from mmopd.config import Fleet, Rollout
from mmopd.modality import Encoder
from mmopd.passes.answers import Library
from mmopd.prompts.rows import RowError
from mmopd.prompts.shards import Shards
from mmopd.records import Encoded, Sample
from mmopd.rollout.collect import Refusal, collect, find_undecodable, version_of
from mmopd.rollout.student_client import EngineError, StudentClient
from mmopd.runtime.run_folder import RunFolder
from mmopd.serving import endpoint
from mmopd.task.base import Task
from mmopd.task.load import load_tasks
from mmopd.task.verifier_pool import VerifierPool
from mmopd.teacher import identity
from mmopd.teacher.router import references
from mmopd.teacher.score_cache import ScoreCache
from mmopd.teacher.scorer import Scorer
from mmopd.train.distributed import Ranks
from mmopd.train.weight_publisher import WeightPublisher

LOOK_EVERY = 1.0  # seconds
Replace = Callable[[Mapping[int, Encoded], Mapping[int, RowError]], Mapping[int, Encoded]]


class Rollouts:
    """The samples of all ranks, step by step. An async context manager, bound to one event loop.

    Attributes:
        engines: the student's; each serves a share of the groups.
        kept: scores since the last checkpoint.
        verifiers: of all tasks.

    Args:
        fleet: the teachers and routes; empty if the objective needs none.
        timeout: seconds for an answer of an engine.
        seed: of the run.

    Raises:
        ConfigError: a prompt has no teacher, or a teacher has no endpoint.
        DataError: (SFT) the teachers' answers are missing or cannot be used.
    """

    def __init__(
        self,
        run: RunFolder,
        sources: Mapping[str, Shards],
        encoder: Encoder,
        ranks: Ranks,
        *,
        fleet: Fleet,
        rollout: Rollout,
        algorithm: Algorithm,
        timeout: float,
        seed: int,
    ) -> None:
        self._rollout = rollout
        self._visual = algorithm.visual
        self._seed = seed
        self._ranks = ranks
        students, teachers = endpoint.load_by_role(run.endpoints)
        tasks: Mapping[str, Task] = load_tasks()
        objective = algorithm.objective
        self.engines = [StudentClient(student, encoder, timeout=timeout) for student in students]
        self.kept = ScoreCache(run.scores, ranks.rank)
        self._library = None
        if objective.teacher_answers():
            self._library = Library(
                sources,
                encoder,
                fleet=fleet,
                rollout=rollout,
                algorithm=algorithm,
                identities=identity.known(run.teachers),
                seed=seed,
            )
        self._scorers: dict[str, Scorer] = {}
        self._counted = Counter[str]()
        self._rolling: Rolling | None = None
        if objective.needs_teachers and self._library is None:
            top_k = objective.likeliest()
            self._scorers["scorer"] = Scorer(fleet, tasks, teachers, encoder, top_k=top_k, kept=self.kept)
        if before := references(fleet, objective):
            self._scorers["reference"] = Scorer(before, tasks, teachers, encoder, kept=self.kept)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for engine in self.engines:
                await stack.enter_async_context(engine)
            for scorer in self._scorers.values():
                await stack.enter_async_context(scorer)
            stack.enter_context(self.kept)
            self.verifiers = stack.enter_context(VerifierPool())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rolling is not None:
            await self._rolling.cancel()
        await self._stack.aclose()

    def status(self) -> list[dict[str, Any]]:
        """Return what the student's engines and the teachers' replicas do now; any thread may call this."""
        scorers = [pool for scorer in self._scorers.values() for pool in scorer.status()]
        return [*(engine.status() for engine in self.engines), *scorers]

    def begin(self, step: int, prompts: Sequence[Encoded]) -> "Rolling":
        """Start the rollouts of a step: this rank's share of its groups."""
        return self._begin(step, dict(enumerate(prompts)))

    async def finish(self, rolling: "Rolling", weight_publisher: WeightPublisher, replace: Replace) -> "Rolled":
        """Return prompts and samples of a step, the same on all ranks. Collective.

        A prompt that cannot be used is replaced by the next one of its source.

        Args:
            replace: returns other prompts, by group, for those that cannot be used; see `Stream.replace`.

        Raises:
            EngineError: an engine is lost permanently, does not answer as expected, or refuses every prompt.
            ServerError: teachers refuse every prompt.
            DataError: too many consecutive rows of a source cannot be used.
        """
        prompts = dict(rolling.prompts)
        samples: list[Sample] = []
        refused: list[Refusal] = []
        seconds = 0.0
        while True:
            parts = await self._end(rolling, weight_publisher)
            samples += chain.from_iterable(part.samples for part in parts)
            seconds += max(part.seconds for part in parts)
            now = {refusal.group: refusal for part in parts for refusal in part.refused}
            refused += now.values()
            if not samples:
                check_alive(refused)
            if not now:
                break
            others = replace(rolling.prompts, {group: refusal.row for group, refusal in now.items()})
            prompts |= others
            rolling = self._begin(rolling.step, others)
        in_order = [prompts[group] for group in sorted(prompts)]
        return Rolled(in_order, sorted(samples, key=lambda sample: sample.group), seconds)

    def _begin(self, step: int, prompts: Mapping[int, Encoded]) -> "Rolling":
        share = list(prompts.items())[self._ranks.rank :: self._ranks.size]
        self._rolling = Rolling(step, prompts, asyncio.create_task(self._roll(step, share)))
        return self._rolling

    async def _end(self, rolling: "Rolling", weight_publisher: WeightPublisher) -> "list[Part]":
        """Return what each rank rolled out. Collective.

        If an engine was lost, it gets its weights again, and the step is rolled out once more with the same seeds.
        Rollouts that ran ahead of a weight sync may have used an engine that was replaced since: they are repeated once
        before an engine counts as lost.

        Raises:
            EngineError: an engine is lost permanently, or does not answer as expected.
        """
        version = version_of(rolling.step)
        excused = self._rollout.async_steps > 0
        while (ended := await rolling.end(self._ranks)).failed:
            await rolling.cancel()
            if not excused:
                await weight_publisher.wait_for_engine(version, ended.error)
                await weight_publisher.publish(version, everything=True)
            excused = False
            rolling = self._begin(rolling.step, rolling.prompts)
        return self._ranks.gather_objects(rolling.task.result())

    def spent(self) -> Counter[str]:
        """Return what the scorers of all ranks have counted since the last call. Collective."""
        now = sum((scorer.counts for scorer in self._scorers.values()), Counter[str]())
        since = now - self._counted
        self._counted = now
        return sum(self._ranks.gather_objects(since), Counter[str]())

    async def _roll(self, step: int, share: Sequence[tuple[int, Encoded]]) -> "Part":
        begin = time.perf_counter()
        if self._library is not None:
            found = [await find_undecodable(number, encoded) for number, encoded in share]
            refused = [refusal for refusal in found if refusal is not None]
            usable = [one for one, refusal in zip(share, found, strict=True) if refusal is None]
            samples = [sample for number, encoded in usable for sample in self._library.samples(number, encoded, step)]
        else:
            samples, refused = await collect(
                share,
                rollout=self._rollout,
                seed=self._seed,
                step=step,
                visual=self._visual,
                engines=self.engines,
                verifiers=self.verifiers,
                **self._scorers,
            )
        return Part(samples, refused, time.perf_counter() - begin)


def check_alive(refused: Sequence[Refusal]) -> None:
    """Raise if an engine or a teacher has refused two prompts or more of a step; call it while no prompt was usable.

    Raises:
        EngineError, ServerError: what it said about the first prompt.
    """
    servers = [refusal.server for refusal in refused if refusal.server is not None]
    if len(servers) > 1:
        raise servers[0]


class Part(NamedTuple):
    """What one rank rolled out."""

    samples: list[Sample]
    refused: list[Refusal]
    seconds: float


class Rolled(NamedTuple):
    """A step that was rolled out."""

    prompts: list[Encoded]  # by group
    samples: list[Sample]  # in the order of their groups
    seconds: float


class End(NamedTuple):
    """The end of a step's rollouts."""

    failed: bool  # on any rank, because of an engine
    error: EngineError | None  # of this rank


@dataclass(frozen=True, slots=True)
class Rolling:
    """The rollouts of a step, in progress."""

    step: int
    prompts: Mapping[int, Encoded]  # by group
    task: asyncio.Task[Any]  # of a Part

    async def end(self, ranks: Ranks) -> "End":
        """Wait until they have ended on all ranks, or an engine has failed on one. Collective.

        Ranks exchange their state every second, so that no rank waits longer in a collective, however unequal their
        shares are.
        """
        while True:
            await asyncio.wait({self.task}, timeout=LOOK_EVERY)
            error = self.task.exception() if self.task.done() else None
            if error is not None and not isinstance(error, EngineError):
                raise error
            failed, going_on = ranks.all_max([error is not None, not self.task.done()])
            if failed or not going_on:
                return End(bool(failed), error)

    async def cancel(self) -> None:
        """Cancel the rollouts and their requests."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
