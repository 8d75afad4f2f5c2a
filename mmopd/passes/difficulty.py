"""The offline difficulty pass (paper 3.3, A.1): the untrained student answers every prompt K times; the books are
`prompts.difficulty`.
"""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

from mmopd.config import Difficulty, Recipe
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.passes.each_row import each_row
from mmopd.prompts import difficulty_counts
from mmopd.prompts.difficulty_counts import Counts, Measured
from mmopd.prompts.shards import Shards
from mmopd.records import Encoded
from mmopd.rollout.collect import seed_of
from mmopd.rollout.student_client import StudentEngine
from mmopd.runtime.fingerprint import hash_model
from mmopd.runtime.progress import Stage
from mmopd.serving.endpoint import Endpoint
from mmopd.task.verifier_pool import VerifierPool


def run_pass(
    recipe: Recipe, sources: Mapping[str, Shards], students: Sequence[Endpoint], out: Path, stage: Stage
) -> dict[str, Measured]:
    """Answer what has not been answered yet, and write `difficulty_counts.json` and the picture into `out`.

    Raises:
        EngineError: an engine of the student is gone; what was counted is kept.
        UserError: the recipe has difficulty switched off, the counts beside the shards cannot be used, or the policy
            leaves nothing.
    """
    settings = _settings(recipe)
    threshold, weights_of = recipe.algorithm.outcome_threshold, hash_model(recipe.student.model)
    with ExitStack() as stack:
        counts: dict[str, Counts] = {}
        for name, shards in sources.items():
            made_from = difficulty_counts.origin(
                shards, weights_of, settings, max_tokens=recipe.rollout.max_tokens, threshold=threshold
            )
            counts[name] = stack.enter_context(Counts(difficulty_counts.counts_file(shards, made_from), made_from))
        total, done = sum(map(len, sources.values())), sum(map(len, counts.values()))
        stage.total(total, done=done)
        unreadable = asyncio.run(_answer(recipe, sources, counts, students, stage)) if done < total else 0
        measured = {
            name: difficulty_counts.measure(counts[name], len(shards), settings) for name, shards in sources.items()
        }
    stage.outcome = (
        f"{total - done} prompts x {settings.attempts} answers" if done < total else "counted before, beside the shards"
    )
    stage.outcome += f", {unreadable} prompts could not be read" if unreadable else ""
    out.mkdir(parents=True, exist_ok=True)
    difficulty_counts.draw(out / difficulty_counts.PICTURE, measured)
    difficulty_counts.save(
        out / difficulty_counts.FILE, measured, {name: shards.fingerprint for name, shards in sources.items()}
    )
    return measured


async def _answer(
    recipe: Recipe,
    sources: Mapping[str, Shards],
    counts: Mapping[str, Counts],
    students: Sequence[Endpoint],
    stage: Stage,
) -> int:
    """Count the right answers of every row that is not counted yet; how many rows could not be read.

    An answer that the verifier cannot judge is not counted as an attempt, and a row that cannot be read has none. The
    draws do not depend on the run's seed: runs share the counts.
    """
    settings, encoder = _settings(recipe), Encoder(recipe.student.model)
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(StudentEngine(student, encoder, timeout=recipe.train.timeout))
            for student in students
        ]
        verifiers, turns = stack.enter_context(VerifierPool()), itertools.cycle(engines)

        async def right_of(encoded: Encoded) -> tuple[int, int]:
            prompt = encoded.prompt
            responses = await next(turns).sample(
                encoded,
                settings.attempts,
                seed_of("difficulty", prompt.key),
                max_tokens=recipe.rollout.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
            )
            outcomes = await asyncio.gather(*(verifiers.verify(prompt.task, r.text, prompt.answer) for r in responses))
            known = [outcome.value >= recipe.algorithm.outcome_threshold for outcome in outcomes if outcome.known]
            return sum(known), len(known)

        at_once = recipe.rollout.concurrency * len(engines)
        return await each_row(sources, counts, encoder, right_of, (0, 0), at_once=at_once, stage=stage)


def _settings(recipe: Recipe) -> Difficulty:
    if recipe.algorithm.difficulty is None:
        raise UserError(
            "algorithm.difficulty is null in this recipe: there is nothing to measure; give it at least `{}`"
        )
    return recipe.algorithm.difficulty
