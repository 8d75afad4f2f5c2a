"""The offline difficulty pass (paper 3.3, A.1): the untrained student answers every prompt K times.

`prompts.difficulty_counts` stores the counts.
"""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

from mmopd.algorithm.settings import Algorithm, Difficulty
from mmopd.config import Rollout, Student
from mmopd.errors import ConfigError
from mmopd.modality import Encoder
from mmopd.passes.each_row import each_row
from mmopd.prompts import difficulty_counts
from mmopd.prompts.difficulty_counts import Counts
from mmopd.prompts.measured import Measured
from mmopd.prompts.shards import Shards
from mmopd.records import Encoded
from mmopd.rollout.collect import seed_of
from mmopd.rollout.student_client import StudentClient
from mmopd.runtime.fingerprint import hash_model
from mmopd.runtime.progress import Stage
from mmopd.serving.endpoint import Endpoint
from mmopd.task.verifier_pool import VerifierPool


def run_pass(
    sources: Mapping[str, Shards],
    endpoints: Sequence[Endpoint],
    out: Path,
    stage: Stage,
    *,
    student: Student,
    rollout: Rollout,
    algorithm: Algorithm,
    timeout: float,
) -> dict[str, Measured]:
    """Answer all prompts that have no counts yet, and write `difficulty_counts.json` and the plot into `out`.

    Args:
        endpoints: the student's engines.
        timeout: seconds for an answer of an engine.

    Raises:
        EngineError: an engine of the student is lost; finished counts are kept.
        ConfigError: the recipe switches difficulty off, or the policy leaves no prompts.
        DataError: the counts next to the shards cannot be used.
    """
    settings = _settings(algorithm)
    threshold = algorithm.outcome_threshold
    weights_of = hash_model(student.model)
    with ExitStack() as stack:
        counts: dict[str, Counts] = {}
        for name, shards in sources.items():
            made_from = difficulty_counts.origin(
                shards, weights_of, settings, max_tokens=rollout.max_tokens, threshold=threshold
            )
            counts[name] = stack.enter_context(Counts(difficulty_counts.counts_file(shards, made_from), made_from))
        total = sum(map(len, sources.values()))
        done = sum(map(len, counts.values()))
        stage.total(total, done=done)
        unreadable = 0
        if done < total:
            unreadable = asyncio.run(
                _answer(
                    sources,
                    counts,
                    endpoints,
                    stage,
                    student=student,
                    rollout=rollout,
                    algorithm=algorithm,
                    timeout=timeout,
                )
            )
        measured = {
            name: difficulty_counts.measure(counts[name], len(shards), settings) for name, shards in sources.items()
        }
    stage.outcome = (
        f"{total - done} prompts x {settings.attempts} answers"
        if done < total
        else "counted before, next to the shards"
    )
    stage.outcome += f", {unreadable} prompts could not be read" if unreadable else ""
    out.mkdir(parents=True, exist_ok=True)
    difficulty_counts.draw(out / difficulty_counts.PICTURE, measured)
    difficulty_counts.save(
        out / difficulty_counts.FILE, measured, {name: shards.fingerprint for name, shards in sources.items()}
    )
    return measured


async def _answer(
    sources: Mapping[str, Shards],
    counts: Mapping[str, Counts],
    endpoints: Sequence[Endpoint],
    stage: Stage,
    *,
    student: Student,
    rollout: Rollout,
    algorithm: Algorithm,
    timeout: float,
) -> int:
    """Count the right answers of every row that has no count yet; return how many rows could not be read.

    An answer that the verifier cannot judge does not count as an attempt, and an unreadable row has none. The draws do
    not depend on the run's seed, so that runs can share the counts.
    """
    settings = _settings(algorithm)
    encoder = Encoder(student.model)
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(StudentClient(endpoint, encoder, timeout=timeout)) for endpoint in endpoints
        ]
        verifiers = stack.enter_context(VerifierPool())
        turns = itertools.cycle(engines)

        async def right_of(encoded: Encoded) -> tuple[int, int]:
            prompt = encoded.prompt
            responses = await next(turns).sample(
                encoded,
                settings.attempts,
                seed_of("difficulty", prompt.key),
                max_tokens=rollout.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
            )
            outcomes = await asyncio.gather(*(verifiers.verify(prompt.task, r.text, prompt.answer) for r in responses))
            known = [outcome.value >= algorithm.outcome_threshold for outcome in outcomes if outcome.known]
            return sum(known), len(known)

        at_once = rollout.concurrency * len(engines)
        return await each_row(sources, counts, encoder, right_of, (0, 0), at_once=at_once, stage=stage)


def _settings(algorithm: Algorithm) -> Difficulty:
    if algorithm.difficulty is None:
        raise ConfigError(
            "algorithm.difficulty is null in this recipe, so there is nothing to measure; set it to `{}` at least"
        )
    return algorithm.difficulty
