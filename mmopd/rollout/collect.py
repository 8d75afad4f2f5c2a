"""Roll out one step: sample, verify and score, concurrently.

A response is verified and scored as soon as it is finished, while others are still being generated. Short responses of
a group are requested together: for them a request costs more than waiting for the longest response.
"""

import asyncio
import hashlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeVar

from mmopd.algorithm.settings import Visual
from mmopd.config import Rollout
from mmopd.errors import ServerError
from mmopd.modality.registry import check_items
from mmopd.prompts.rows import RowError
from mmopd.records import Absent, Encoded, Response, Sample, Score
from mmopd.rollout.student_client import EngineError, PromptRefusedError, StudentClient
from mmopd.task.verifier_pool import VerifierPool

UNNAMED = (("", 0),)  # versions of a response whose server does not name them
SHORT = 256  # tokens; up to this limit a group is one request
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A prompt that broke when it was used."""

    group: int
    row: RowError  # why its row cannot be used
    # What is wrong if no prompt can be used: the engine or a teacher; None if only the row can be wrong.
    server: EngineError | ServerError | None = None


class ResponseScorer(Protocol):
    """Scores responses by the teachers of their prompts, such as `mmopd.teacher.scorer.Scorer`."""

    def sees_image(self, encoded: Encoded) -> bool:
        """Return true if a teacher of the prompt is shown images or clips."""

    async def score(self, encoded: Encoded, tokens: tuple[int, ...], *, blind: bool = False) -> Score | Absent:
        """Return the log-probs of a response; Absent, with its reason, if there are none.

        Args:
            blind: show the teacher a blank in place of each image.
        """


def seed_of(*parts: object) -> int:
    """Return a 31-bit seed from values that identify a draw, the same on every machine and rank."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def version_of(step: int) -> str:
    """Return the name of the weights that the rollouts of a step must have."""
    return f"step-{step}"


async def collect(
    share: Sequence[tuple[int, Encoded]],
    *,
    rollout: Rollout,
    seed: int,
    step: int,
    engines: Sequence[StudentClient],
    verifiers: VerifierPool,
    visual: Visual | None = None,
    scorer: ResponseScorer | None = None,
    reference: ResponseScorer | None = None,
) -> tuple[list[Sample], list[Refusal]]:
    """Return G samples of each prompt of this rank's share, (group number over all ranks, prompt), in its order.

    A prompt without samples is among the refusals: its images do not decode, the engine refuses it, or its teachers
    refuse all of its responses.

    Args:
        seed: of the run.
        engines: group n goes to engine n modulo their number; all have the same weights.
        visual: gives the share of responses to image prompts that are also scored without the image.
        scorer: None if only outcomes are needed.
        reference: scores by the teachers' references, if the objective has them.

    Raises:
        EngineError: an engine is lost, or has sampled from other weights than it should because it was restarted.
    """
    gate = asyncio.Semaphore(rollout.concurrency)
    G = rollout.group
    allowed = {version_of(step - late) for late in range(rollout.async_steps + 1)}
    sampling = rollout.model_dump(include={"max_tokens", "temperature", "top_p", "top_k"})
    at_once = G if rollout.max_tokens <= SHORT else 1

    running: set[asyncio.Task[Any]] = set()

    def spawn(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        running.add(task)
        task.add_done_callback(running.discard)
        return task

    async def one_group(number: int, encoded: Encoded) -> list[Sample] | Refusal:
        first_seed = seed_of(seed, step, encoded.prompt.key)
        engine = engines[number % len(engines)]

        async def some(first: int) -> list[asyncio.Task[Sample]]:
            responses = await engine.sample(encoded, at_once, first_seed + first, **sampling)
            if strange := {version for response in responses for version, _ in response.versions or UNNAMED} - allowed:
                raise EngineError(
                    f"the student's engine sampled from weights {strange.pop()!r} in step {step}: it was started again"
                )
            return [spawn(assess(number, encoded, first + i, response)) for i, response in enumerate(responses)]

        try:
            async with gate:
                if undecodable := await find_undecodable(number, encoded):
                    return undecodable
                assessed = await asyncio.gather(*(spawn(some(first)) for first in range(0, G, at_once)))
        except PromptRefusedError as error:
            return Refusal(number, RowError("refused by the engine", str(error)), error)
        samples = await asyncio.gather(*chain.from_iterable(assessed))
        return _refused_by_teachers(number, encoded, samples) or samples

    async def assess(number: int, encoded: Encoded, i: int, response: Response) -> Sample:
        prompt = encoded.prompt
        chosen = visual and scorer and scorer.sees_image(encoded) and _draw(seed, step, prompt.key, i) < visual.share
        score, blind, before, outcome = await asyncio.gather(
            _score(scorer, encoded, response),
            _score(scorer if chosen else None, encoded, response, blind=True),
            _score(reference, encoded, response),
            verifiers.verify(prompt.task, response.text, prompt.answer),
        )
        if isinstance(before, Absent):
            return Sample(number, response, outcome, before, blind)
        return Sample(number, response, outcome, score, blind, before)

    try:
        groups = await asyncio.gather(*(spawn(one_group(n, e)) for n, e in share))
    finally:  # after a failure, cancel what is still running
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    refused = [group for group in groups if isinstance(group, Refusal)]
    return [sample for group in groups if not isinstance(group, Refusal) for sample in group], refused


async def find_undecodable(number: int, encoded: Encoded) -> Refusal | None:
    """Return a refusal if an item of a prompt does not decode to the size that its grid was counted from."""
    if not encoded.prompt.is_visual:
        return None
    try:
        await asyncio.to_thread(check_items, encoded.prompt)
    except ValueError as error:
        return Refusal(number, RowError("undecodable", str(error)))
    return None


def _refused_by_teachers(number: int, encoded: Encoded, samples: Sequence[Sample]) -> Refusal | None:
    """Return a refusal if teachers refuse each response to a prompt; long responses alone may be refused too."""
    absent = [s.score for s in samples if isinstance(s.score, Absent) and s.score.of_prompt]
    if len(absent) < len(samples):
        return None
    first = absent[0]
    why = f"teacher {first.teacher} refuses prompt {encoded.prompt.key}: {first.cause}: {first.detail}"
    return Refusal(number, RowError(f"refused by {first.teacher}", why), ServerError(why))


def _draw(*parts: object) -> float:
    """Return a number in [0, 1) from values that identify a draw."""
    return seed_of("visual", *parts) / 2**31


async def _score(
    scorer: ResponseScorer | None, encoded: Encoded, response: Response, *, blind: bool = False
) -> Score | Absent | None:
    return await scorer.score(encoded, response.tokens, blind=blind) if scorer else None
