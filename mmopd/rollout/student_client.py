"""Client of the student's engine over HTTP: samples groups of responses, and gives log-probs for the weight probe.

Unlike with a teacher, an error here is an exception: without its own samples a run has nothing to learn from.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from mmopd.modality import Encoder
from mmopd.modality.registry import MEDIA
from mmopd.records import Encoded, Response
from mmopd.serving import wire
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.replicas import ReplicaPool, connect

# Seconds for a group of responses: one attempt may take all of it, since another would wait in the same queue.
TIMEOUT = 3600.0
PATIENCE = 30.0  # seconds to wait for an engine that does not answer at all
T = TypeVar("T")


class EngineError(Exception):
    """The student's engine does not answer, or gives an unexpected answer."""


class PromptRefusedError(EngineError):
    """The engine answers, and refuses one prompt or reads it in another way."""


class StudentClient:
    """One vLLM server that holds the student's weights. An async context manager, bound to one event loop.

    Args:
        endpoint: the server.
        encoder: the student's.
        concurrency: maximum number of requests in flight.
        timeout: seconds for a group of responses.
        patience: seconds to wait for an engine that does not answer at all.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        encoder: Encoder,
        *,
        concurrency: int = 4096,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
    ) -> None:
        self._endpoint = endpoint
        self._encoder = encoder
        self._limits = {"timeout": timeout, "attempt": timeout, "patience": patience}
        self._concurrency = concurrency
        self._end = int(encoder.tokenizer.eos_token_id)
        # Special tokens never belong in an answer, and a placeholder of an image would break the trainer. Added tokens
        # that are not special (`</think>`, `<tool_call>`) stay allowed: reasoning models write them.
        special = {i for i, token in encoder.tokenizer.added_tokens_decoder.items() if token.special}
        # So do rows of the head without a token. Only on the student's engine: the head of a teacher that answers may
        # have another height, and vLLM refuses a bias beyond it.
        padding = encoder.without_token if endpoint.role == "student" else frozenset()
        self.banned = tuple(sorted((special | set(encoder.banned) | padding) - {self._end}))

    async def __aenter__(self) -> Self:
        self._http = connect()
        self._pool = ReplicaPool(
            [self._endpoint], self._http, **self._limits, concurrency=self._concurrency, counts=Counter()
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    def status(self) -> dict[str, Any]:
        """Return what the engine does now; any thread may call this, once the client is open."""
        return self._pool.status()

    async def sample(
        self,
        encoded: Encoded,
        n: int,
        seed: int,
        *,
        max_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> list[Response]:
        """Return n responses to a prompt, from one request.

        The same (weights, prompt, seed) gives the same responses where engines repeat (docs/repetition.md); elsewhere
        the last bits depend on what the engine computes in the same pass.

        Args:
            seed: response i is drawn with `seed + i`, so seeds of different prompts should be far apart.

        Raises:
            PromptRefusedError: the engine does not take this prompt.
            EngineError: the engine is lost, or gives an unexpected answer.
        """
        sampling = wire.Sampling(n, seed, temperature, top_p, top_k, max_tokens, self.banned)

        def build(model: str) -> bytes:
            return wire.sampling_body(model, encoded, sampling)

        def parse(reply: bytes, request_id: str) -> list[wire.Choice]:
            return wire.parse_samples(reply, request_id, encoded.expanded, sampling, self._end)

        choices = await self._call("sample", encoded, build, parse)
        return [Response(c.tokens, c.logprobs, self._encoder.decode(c.tokens), c.finish, c.versions) for c in choices]

    async def logprobs(self, encoded: Encoded, tokens: Sequence[int]) -> list[float]:
        """Return the log-prob of each token of a response, computed in one pass over prompt and response.

        Raises:
            EngineError: the engine is lost, refuses, or gives an unexpected answer.
        """

        def build(model: str) -> bytes:
            return wire.scoring_body(model, encoded, tokens)

        def parse(reply: bytes, request_id: str) -> tuple[float, ...]:
            return wire.parse_scores(reply, request_id, encoded.expanded, tokens)

        return list(await self._call("score", encoded, build, parse))

    async def _call(
        self, what: str, encoded: Encoded, build: Callable[[str], bytes], parse: Callable[[bytes, str], T]
    ) -> T:
        try:
            return await self._pool.call(build, parse)
        except wire.ReplyError as fault:
            needed = {medium: len(encoded.prompt.items(name)) for name, medium in MEDIA.items() if medium.limit}
            hint = "".join(
                f"; with {medium.items} it needs student.engine.{medium.limit}={n}" for medium, n in needed.items() if n
            )
            failed = f"engine {self._endpoint.name} could not {what} prompt {encoded.prompt.key}: {fault}"
            kind = PromptRefusedError if fault.of_prompt else EngineError
            raise kind(f"the student's {failed}; see its log{hint}") from fault
