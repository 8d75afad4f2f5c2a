"""Samples the responses to the problems of a benchmark; each is written when it arrives, and never asked for again.

Every response has a request of its own: a stopped evaluation loses only what was in flight, and a short response does
not wait for a long one. The seeds of a problem follow each other, so that they are distinct; those of different
problems are far apart.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from mmopd.config.suite import SampledBenchmark
from mmopd.evaluate.sampled.base import Problem, Sample
from mmopd.evaluate.sampled.judging import BEGIN
from mmopd.evaluate.score import InvalidRunError
from mmopd.modality import Encoder
from mmopd.prompts.ledger import Ledger
from mmopd.records import Encoded, Prompt, Response
from mmopd.rollout.collect import UNNAMED, seed_of
from mmopd.rollout.student_client import EngineError, PromptRefusedError, StudentClient
from mmopd.serving.endpoint import Endpoint


class Responses(Ledger):
    """The responses that are known already, by number: response i to problem p of P is number i * P + p.

    More responses to each problem therefore add to the file, and change nothing in it.
    """

    what = "responses"

    def sample(self, number: int) -> Sample:
        """Return a response."""
        return Sample(**self[number][0])


class Weights:
    """The weights that answer, which have to be the same throughout.

    Args:
        objection: returns why the engine's present weights are not those that are meant, or "".
    """

    def __init__(self, objection: Callable[[], str]) -> None:
        self._objection = objection
        self._names: set[str] = set()
        self._changing = asyncio.Lock()

    async def check(self, response: Response) -> None:
        """Check a response before it is kept.

        Raises:
            InvalidRunError: it is of other weights than the ones before it, or the first one is of the wrong ones.
        """
        async with self._changing:
            if not self._names and (why := await asyncio.to_thread(self._objection)):
                raise InvalidRunError(why)
            self._names |= {name for name, _ in response.versions or UNNAMED}
            if len(self._names) > 1:
                names = " and ".join(repr(name) for name in sorted(self._names))
                raise InvalidRunError(f"weights {names} answered: the engine was started again, or updated")


@dataclass(frozen=True, slots=True)
class Questions:
    """The problems of a benchmark as token ids, and the row of the suite that says how they are questions."""

    row: SampledBenchmark
    problems: Sequence[Problem]
    encoded: Sequence[Encoded]
    opens_thought: bool  # the prompt ends in a thought that the response goes on with


def encode(row: SampledBenchmark, problems: Sequence[Problem], encoder: Encoder) -> Questions:
    """Return the problems as token ids, by the model's chat template as in rollouts.

    Raises:
        InvalidRunError: a problem does not fit the template.
    """
    try:
        encoded = [
            encoder.encode(Prompt(problem.key, row.benchmark, "text", problem.messages, (), "")) for problem in problems
        ]
    except ValueError as error:
        raise InvalidRunError(str(error)) from None
    end = encoder.tokenizer.decode(list(encoded[0].ids[-8:]))
    return Questions(row, problems, encoded, end.rstrip().endswith(BEGIN))


def seed_for(row: SampledBenchmark, key: str, i: int) -> int:
    """Return the seed of response i to a problem."""
    return seed_of("eval", row.seed, key) + i


async def sample_all(
    questions: Questions,
    endpoint: Endpoint,
    encoder: Encoder,
    known: Responses,
    weights: Weights,
    *,
    concurrency: int,
    timeout: float,
) -> list[Sample]:
    """Return n responses to each problem, problem by problem, of which those in `known` are not asked for.

    Args:
        concurrency: requests in flight.
        timeout: seconds for all of them.

    Raises:
        InvalidRunError: a request failed, time is up, or the engine's weights changed; finished responses are kept.
    """
    P = len(questions.problems)
    todo = [number for number in range(P * questions.row.n) if number not in known]
    gate = asyncio.Semaphore(concurrency)

    async with StudentClient(endpoint, encoder, timeout=timeout) as client:

        async def one(number: int) -> None:
            i, p = divmod(number, P)
            async with gate:
                sample = await _ask(questions, client, weights, i, p)
            known.add(number, asdict(sample))

        tasks = [asyncio.create_task(one(number)) for number in todo]
        try:
            async with asyncio.timeout(timeout):
                await asyncio.gather(*tasks)
        except TimeoutError:
            done = f"{len(known):,} of {P * questions.row.n:,} responses are kept"
            raise InvalidRunError(f"not finished after {timeout:g} s (`timeout` of the suite); {done}") from None
        finally:  # after a failure, cancel what is still running
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return [known.sample(i * P + p) for p in range(P) for i in range(questions.row.n)]


async def _ask(questions: Questions, client: StudentClient, weights: Weights, i: int, p: int) -> Sample:
    """Ask for response i to problem p."""
    row = questions.row
    encoded = questions.encoded[p]
    key = questions.problems[p].key
    seed = seed_for(row, key, i)
    try:
        [response] = await client.sample(
            encoded, 1, seed, max_tokens=row.max_tokens, temperature=row.temperature, top_p=row.top_p
        )
    except PromptRefusedError as error:
        raise InvalidRunError(f"problem {key} is refused: {error}") from None
    except EngineError as error:
        raise InvalidRunError(f"a request failed: {error}") from None
    await weights.check(response)
    tokens = len(response.tokens)
    if response.finish == "length" and tokens < row.max_tokens:
        raise InvalidRunError(
            f"the server cut a response to problem {key} after {tokens:,} tokens, and max_tokens is "
            f"{row.max_tokens:,}: max_model_len of the engine is too small"
        )
    return Sample(key, i, seed, response.text, tokens, response.finish)
