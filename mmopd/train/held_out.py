"""Evaluate the student between steps: its engines answer held-out rows, and the verifiers of their tasks judge.

A suite of benchmarks is run after them, if the recipe names one. Rows, seeds and sampling are the same each time. A
score counts only if every response is of the weights that were published last; otherwise there is no score for that
step.
"""

import asyncio
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import NamedTuple, Self

from mmopd import catalog
from mmopd.config import Recipe
from mmopd.errors import ConfigError, DataError
from mmopd.evaluate.score import mean_and_error
from mmopd.modality import Encoder
from mmopd.modality.registry import check_items
from mmopd.prompts.rows import RowError
from mmopd.prompts.shards import Shards, open_mixture
from mmopd.prompts.tokens import hash_processor
from mmopd.records import Encoded
from mmopd.report.metrics import JsonLines
from mmopd.rollout.collect import UNNAMED, seed_of, version_of
from mmopd.rollout.student_client import EngineError, PromptRefusedError, StudentClient
from mmopd.runtime.run_folder import RunFolder
from mmopd.task.load import load_tasks
from mmopd.task.verifier_pool import VerifierPool
from mmopd.train.clock import Clock
from mmopd.train.distributed import Ranks
from mmopd.train.rollouts import Rolling, Rollouts
from mmopd.train.suite import SuiteRuns, metrics_of, suite_between_steps


class Row(NamedTuple):
    """What one rank found about a held-out row."""

    source: str
    right: float | None  # share of the responses with a known outcome; None if there is none
    cut: int  # responses that ended at the token limit
    unknown: int  # responses without an outcome


def held_out_sources(recipe: Recipe, trained: Mapping[str, Shards]) -> dict[str, Shards]:
    """Return the sources of the held-out rows; none if the recipe asks for no evaluation.

    Args:
        trained: the sources that the student trains on.

    Raises:
        ConfigError: the mixture names an unknown task, or a source that is trained on.
        DataError: a source cannot be opened.
    """
    if recipe.evaluate is None or recipe.evaluate.mixture is None:
        return {}
    path = recipe.evaluate.mixture
    mixture = catalog.load_mixture(path, key="evaluate.mixture")
    try:
        sources = open_mixture(mixture, load_tasks(), Path.cwd(), hash_processor(recipe.student.model))
    except DataError as error:
        raise DataError(f"evaluate.mixture: {path}: {error}") from None
    known = {shards.fingerprint: name for name, shards in trained.items()}
    for name, shards in sources.items():
        if (same := known.get(shards.fingerprint)) is not None:
            raise ConfigError(
                f"evaluate.mixture: source {name!r} of {path} has the rows of source {same!r}, which the student "
                "trains on; name rows that are held out"
            )
    return sources


class HeldOut:
    """The held-out rows of all ranks, the suite, and the scores of the student on them.

    Without `evaluate` in the recipe it measures nothing. A context manager, which closes its file and ends the suite.

    Args:
        run: scores of weights after more than `done` steps are removed from its held_out.jsonl.
        trained: the sources that the student trains on.
        done: steps of the checkpoint that the run continues from.
        stopping: returns whether the run has to stop, so that no benchmark may hold it up.

    Raises:
        ConfigError, DataError: as `held_out_sources`; DataError also if no row of a source can be used.
    """

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        trained: Mapping[str, Shards],
        encoder: Encoder,
        *,
        ranks: Ranks,
        done: int,
        stopping: Callable[[], bool],
    ) -> None:
        self._stopping = stopping
        self._settings = recipe.evaluate
        self._ranks = ranks
        self._done = done
        self._threshold = recipe.algorithm.outcome_threshold
        self._rollout = recipe.rollout
        self._share: list[tuple[str, Encoded]] = []
        self._record: JsonLines | None = None
        self._suite: SuiteRuns | None = None
        self._benchmarks = 0  # of the suite
        if self._settings is not None:
            sources = held_out_sources(recipe, trained)
            number = self._settings.rows
            rows = [(name, row) for name, shards in sources.items() for row in chosen(shards, number, encoder)]
            self._share = rows[ranks.rank :: ranks.size]
            self._record = JsonLines(run.held_out, done + 1) if ranks.rank == 0 else None
            if (suite := suite_between_steps(recipe)) is not None:
                self._benchmarks = len(suite.benchmarks)
                self._suite = SuiteRuns(run, suite) if ranks.rank == 0 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._record is not None:
            self._record.close()
        if self._suite is not None:
            self._suite.close()

    async def at_start(self, rollouts: Rollouts) -> None:
        """Measure the untrained student, if the recipe wants that and the run begins. Collective."""
        if self._settings is not None and self._settings.at_start and self._done == 0:
            await self.measure(0, rollouts.engines, rollouts.verifiers)

    async def after(self, step: int, rollouts: Rollouts, clock: Clock, *, last: bool) -> dict[str, float]:
        """Return the scores after the update of a step as metrics; empty if it is not their turn. Collective."""
        if self._settings is None or not (last or (step + 1) % self._settings.every == 0):
            return {}
        with clock("held_out"):
            return await self.measure(step + 1, rollouts.engines, rollouts.verifiers)

    async def measure(self, done: int, engines: Sequence[StudentClient], verifiers: VerifierPool) -> dict[str, float]:
        """Return the scores as metrics, the same on all ranks, and record them. Collective.

        Args:
            done: updates of the weights, which the engines have.
            engines: the student's.
        """
        asking = Rolling(done, {}, asyncio.create_task(self._ask(version_of(done), engines, verifiers)))
        if (await asking.end(self._ranks)).failed:
            await asking.cancel()
            return {"held_out_failed": 1.0} | (metrics_of([], self._benchmarks) if self._benchmarks else {})
        rows = list(itertools.chain.from_iterable(self._ranks.gather_objects(asking.task.result())))
        found = scores(rows) | {"held_out_failed": 0.0}
        if self._benchmarks:
            running = Rolling(done, {}, asyncio.create_task(self._run_suite(done)))
            await running.end(self._ranks)
            found |= self._ranks.gather_objects(running.task.result())[0]
        if self._record is not None:
            self._record.append({"step": done} | {key: x if math.isfinite(x) else None for key, x in found.items()})
        return found

    async def _run_suite(self, done: int) -> dict[str, float]:
        """Return the scores of the suite on rank 0, which runs it; nothing on the others."""
        return {} if self._suite is None else await self._suite.scores(done, self._stopping)

    async def _ask(self, version: str, engines: Sequence[StudentClient], verifiers: VerifierPool) -> list[Row]:
        settings = self._settings
        assert settings is not None
        gate = asyncio.Semaphore(self._rollout.concurrency)

        async def one(number: int, source: str, encoded: Encoded) -> Row:
            prompt = encoded.prompt
            async with gate:
                try:
                    responses = await engines[number % len(engines)].sample(
                        encoded,
                        settings.attempts,
                        seed_of("held out", prompt.key),
                        max_tokens=settings.max_tokens or self._rollout.max_tokens,
                        temperature=settings.temperature,
                        top_p=settings.top_p,
                        top_k=settings.top_k,
                    )
                except PromptRefusedError:
                    return Row(source, None, 0, settings.attempts)
            if strange := {name for r in responses for name, _ in r.versions or UNNAMED} - {version}:
                raise EngineError(f"the student's engine answered a held-out row with weights {strange.pop()!r}")
            outcomes = await asyncio.gather(*(verifiers.verify(prompt.task, r.text, prompt.answer) for r in responses))
            right = [float(outcome.value >= self._threshold) for outcome in outcomes if outcome.known]
            cut = sum(response.finish == "length" for response in responses)
            return Row(source, fmean(right) if right else None, cut, len(responses) - len(right))

        tasks = [asyncio.create_task(one(n, *row)) for n, row in enumerate(self._share)]
        try:
            return await asyncio.gather(*tasks)
        finally:  # after a failure, cancel what is still running
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def chosen(shards: Shards, number: int, encoder: Encoder) -> list[Encoded]:
    """Return at most `number` rows of a source, evenly spaced; a row that cannot be used is left out.

    Raises:
        DataError: none can be used; names the source and the last cause.
    """
    found: list[Encoded] = []
    last: Exception | None = None
    number = min(number, len(shards))
    for i in range(number):
        try:
            prompt = shards[i * len(shards) // number]
            check_items(prompt)
            found.append(encoder.encode(prompt))
        except (RowError, ValueError) as error:
            last = error
    if not found:
        raise DataError(f"source {shards.name!r}: none of its held-out rows can be used; the last one: {last}")
    return found


def mean_score(found: Mapping[str, float]) -> float | None:
    """Return the mean over sources, which scores a checkpoint; None if nothing was measured."""
    each = [score for name, score in found.items() if name.startswith("held_out/")]
    return fmean(each) if each else None


def scores(rows: Sequence[Row]) -> dict[str, float]:
    """Return the metrics of an evaluation.

    The error of a score is the standard error of its mean over rows; with less than two rows there is none.
    """
    found: dict[str, float] = {}
    by_source: dict[str, list[float]] = {}
    counts = Counter[str]()
    for row in rows:
        counts.update(cut=row.cut, unknown=row.unknown)
        if row.right is not None:
            by_source.setdefault(row.source, []).append(row.right)
    for source, right in sorted(by_source.items()):
        mean, error = mean_and_error(right)
        found[f"held_out/{source}"] = mean
        found[f"held_out_error/{source}"] = math.nan if error is None else error
    return found | {"held_out_cut": float(counts["cut"]), "held_out_unknown": float(counts["unknown"])}
