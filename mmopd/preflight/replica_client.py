"""Requests to one replica for its examination.

The replica is asked directly, one request at a time, without the retries of a pool: a request that fails once would
also fail in the run.
"""

import asyncio
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

import aiohttp
import msgspec

from mmopd.records import Encoded
from mmopd.serving import wire
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.wire import ReplyError


class ReplicaClient:
    """Sends the requests of an examination to one server.

    Raises:
        ReplyError: (every request) the server does not answer in time, or not as expected.
    """

    def __init__(self, endpoint: Endpoint, http: aiohttp.ClientSession, timeout: float) -> None:
        self._endpoint = endpoint
        self._http = http
        self._timeout = timeout
        self.shares_prompts = False  # whether it computed the last prompt for all its responses

    def named(self, model: str) -> "ReplicaClient":
        """Return a client that asks the same server for another of its models."""
        return ReplicaClient(replace(self._endpoint, model=model), self._http, self._timeout)

    async def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """Return the status and the body of the reply."""
        headers = {"Content-Type": "application/json", **self._endpoint.headers, **(headers or {})}
        url = self._endpoint.url.rstrip("/") + path
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._http.request(
                    method, url, data=body, headers=headers, allow_redirects=False, proxy=self._endpoint.proxy or None
                ) as response,
            ):
                return response.status, await response.read()
        except TimeoutError:
            raise ReplyError("timeout", f"{url}: no answer within {self._timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise ReplyError("connection", f"{url}: {type(error).__name__} {error}".rstrip()) from None

    async def detokenize(self, ids: Sequence[int]) -> str | None:
        """Return the server's text of some ids; None if it has no such route."""
        body = msgspec.json.encode({"model": self._endpoint.model, "tokens": list(ids)})
        status, reply = await self.send("POST", "/detokenize", body)
        if status in (404, 405):
            return None
        if status != 200:
            return f"{status}: {message_of(reply)}"  # for example an id that the server does not know
        try:
            text: str = msgspec.json.decode(reply, type=dict[str, str])["prompt"]
        except (msgspec.DecodeError, KeyError):
            raise ReplyError("malformed", f"no text of ids: {reply[:80]!r}") from None
        return text

    async def score(self, encoded: Encoded, tokens: Sequence[int], top_k: int = 0) -> tuple[float, ...]:
        """Return the server's log-probs of the tokens."""
        request_id = uuid.uuid4().hex
        reply = await self._generate(self._body(encoded, tokens, top_k), request_id)
        scored = wire.parse_scored(reply, request_id, encoded.expanded, tokens, top_k)
        self.shares_prompts = scored.shares_prompts
        return scored.logprobs

    async def prompt_ids(self, encoded: Encoded, tokens: Sequence[int]) -> list[int]:
        """Return the ids of prompt and tokens as the server expands them."""
        reply = await self._generate(self._body(encoded, tokens))
        try:
            return msgspec.json.decode(reply, type=_Ids).prompt_token_ids
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ReplyError("malformed", f"{error}; the reply begins {reply[:80]!r}") from None

    def _body(self, encoded: Encoded, tokens: Sequence[int], top_k: int = 0) -> bytes:
        return wire.scoring_body(self._endpoint.model, encoded, tokens, top_k)

    async def _generate(self, body: bytes, request_id: str = "preflight") -> bytes:
        status, reply = await self.send("POST", wire.PATH, body, {wire.REQUEST_ID: request_id})
        if status != 200:
            raise ReplyError("status", f"{status}: {message_of(reply)}")
        return reply


def message_of(reply: bytes) -> str:
    """Return the message of a server's error, without the JSON around it."""
    try:
        text = json.loads(reply)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        text = reply.decode(errors="replace")
    return str(text)[:300]


class _Ids(msgspec.Struct):
    prompt_token_ids: list[int]
