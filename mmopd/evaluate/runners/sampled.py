"""Benchmarks that mmopd samples itself: n responses to each problem, as rollouts are sampled, judged officially.

Known evaluators cannot do this over HTTP: with one seed for all requests vLLM gives n times the same response, and
pass@k equals pass@1 (docs/decisions/022-text-benchmarks-are-sampled-here.md).
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mmopd.config.suite import SampledBenchmark
from mmopd.errors import ConfigError, DataError
from mmopd.evaluate.runners.base import Asked, Done, Job
from mmopd.evaluate.sampled import judging, known
from mmopd.evaluate.sampled.base import Judge, Problem
from mmopd.evaluate.score import InvalidRunError, Measured, key_of
from mmopd.runtime.fingerprint import hash_files

TOP_K = 0  # all tokens
SAMPLES = "samples.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledJob(Job[SampledBenchmark]):
    """A benchmark that is ready to be sampled."""

    problems: tuple[Problem, ...]
    judge: Judge
    fault: str  # why it cannot be sampled; empty if it can


class Sampled:
    """Runner of the rows that mmopd samples itself."""

    def warm_up(self) -> None:
        """Do nothing: it begins at once."""

    def prepare(self, asked: Asked[SampledBenchmark]) -> SampledJob:
        """Return a job. Published data that cannot be read is a reason why there is no score; local data is an error.

        Raises:
            ConfigError: there is no such benchmark.
            UserError: the judge is not installed.
            DataError: the local data is missing, cut off, or of another schema.
        """
        row = asked.row
        try:
            benchmark = known.find(row.benchmark)
        except ConfigError as error:
            raise ConfigError(f"{row.column}: {error}") from None
        judge = benchmark.judge()
        problems: tuple[Problem, ...] = ()
        fault = "" if asked.model else "it is served elsewhere, and sampling needs the chat template of its folder"
        try:
            problems = benchmark.problems(row.data)[: row.limit]
        except DataError as error:
            if row.data is not None:
                raise
            fault = str(error)
        return SampledJob(
            asked=asked,
            task=row.benchmark,
            metric="pass@1",
            code=(row.benchmark, key_of([[p.key, p.messages, p.reference] for p in problems])),
            data=hash_files([row.data]) if row.data else "",
            settings={
                "responses": row.n,
                "k": list(row.k),
                **row.model_dump(include={"temperature", "top_p", "max_tokens", "seed", "limit"}),
                "top_k": TOP_K,
                **asdict(asked.served),
            },
            versions={"judge": judge.version},
            problems=problems,
            judge=judge,
            fault=fault,
        )

    def measure(self, jobs: Sequence[SampledJob]) -> Iterator[Done[SampledJob]]:
        """Sample one benchmark after the other; each keeps the server busy by itself."""
        for job in jobs:
            begin = time.monotonic()
            found: Measured | str
            try:
                found = _measure(job)
            except InvalidRunError as why:
                found = str(why)
            yield Done(job, found, time.monotonic() - begin)


def _measure(job: SampledJob) -> Measured:
    from mmopd.evaluate.sampled.responses import Responses, Weights, encode, sample_all  # loads torch
    from mmopd.modality import Encoder

    asked = job.asked
    row = asked.row
    if job.fault or asked.model is None:
        raise InvalidRunError(job.fault)
    encoder = Encoder(asked.model)
    questions = encode(row, job.problems, encoder)
    with Responses(_kept(job), _made_from(job)) as responses:
        samples = asyncio.run(
            sample_all(
                questions,
                asked.endpoint,
                encoder,
                responses,
                Weights(asked.objection),
                concurrency=asked.suite.concurrency,
                timeout=asked.suite.timeout,
            )
        )
    verdicts = judging.judge_all(job.problems, samples, job.judge, opened=questions.opens_thought)
    judging.write(asked.folder / SAMPLES, samples, verdicts)
    return judging.score(job.problems, samples, verdicts, n=row.n, ks=row.k)


def _made_from(job: SampledJob) -> dict[str, object]:
    """Return all that decides a response. The number of responses does not: more of them continue the same file."""
    sampling = {key: job.settings[key] for key in ("temperature", "top_p", "top_k", "max_tokens", "seed")}
    return {"weights": job.asked.weights, "problems": list(job.code), "sampling": sampling}


def _kept(job: SampledJob) -> Path:
    """Return the file of responses, which later measurements of the same weights share."""
    asked = job.asked
    if asked.cache is None or not asked.weights:
        return asked.folder / "responses.jsonl"
    return asked.cache / "responses" / f"{key_of(_made_from(job))}.jsonl"
