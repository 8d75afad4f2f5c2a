"""Rollouts of one step: sample, verify and score, group by group, all at once.

While one group is being scored and verified, others are still being generated: a group waits for nobody.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterator, Sequence

from mmopd.config import Difficulty, Recipe
from mmopd.modality import Encoder
from mmopd.records import Encoded, Outcome, Prompt, Sample
from mmopd.rollout.engine import StudentEngine
from mmopd.task.pool import VerifierPool
from mmopd.teacher.client import Scorer


def seed_of(*parts: object) -> int:
    """A 31-bit seed from anything that names a draw, the same on every machine and rank."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


async def collect(
    share: Sequence[tuple[int, Encoded]],
    *,
    recipe: Recipe,
    step: int,
    engine: StudentEngine,
    scorer: Scorer,
    verifiers: VerifierPool,
) -> list[Sample]:
    """G samples of each prompt of this rank's share, (group number over all ranks, prompt), in its order."""
    rollout = recipe.rollout
    gate = asyncio.Semaphore(rollout.concurrency)

    async def one_group(number: int, encoded: Encoded) -> list[Sample]:
        prompt = encoded.prompt
        async with gate:
            responses = await engine.sample(
                encoded,
                rollout.group,
                seed_of(recipe.seed, step, prompt.key),
                max_tokens=rollout.max_tokens,
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                top_k=rollout.top_k,
            )
        scores, outcomes = await asyncio.gather(
            asyncio.gather(*(scorer.score(encoded, r.tokens) for r in responses)),
            asyncio.gather(*(verifiers.verify(prompt.task, r.text, prompt.answer) for r in responses)),
        )
        return [Sample(number, r, o, s) for r, o, s in zip(responses, outcomes, scores, strict=True)]

    groups = await asyncio.gather(*(one_group(n, e) for n, e in share))
    return [sample for group in groups for sample in group]


async def count_right(
    prompts: Iterator[Prompt],
    *,
    settings: Difficulty,
    recipe: Recipe,
    encoder: Encoder,
    engine: StudentEngine,
    verifiers: VerifierPool,
    done: Callable[[str, int, int], None],
) -> None:
    """The offline difficulty pass: calls `done(prompt key, right, known)` as each prompt has its answers.

    An answer that the verifier cannot judge is in neither count. The draws do not depend on the run's seed: runs share the pass.
    """

    async def next_one_by_one() -> None:
        for prompt in prompts:  # the iterator is shared: a prompt is read when somebody is free to ask it
            responses = await engine.sample(
                encoder.encode(prompt),
                settings.attempts,
                seed_of("difficulty", prompt.key),
                max_tokens=recipe.rollout.max_tokens,
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
            )
            outcomes: list[Outcome] = await asyncio.gather(*(verifiers.verify(prompt.task, r.text, prompt.answer) for r in responses))
            known = [outcome for outcome in outcomes if outcome.known]
            done(prompt.key, sum(outcome.value >= recipe.algorithm.outcome_threshold for outcome in known), len(known))

    await asyncio.gather(*(next_one_by_one() for _ in range(recipe.rollout.concurrency)))
