"""A server that speaks the wire format of vLLM's `POST /inference/v1/generate`, and fails on request.

It uses real sockets and no model: a log-prob is a formula of the token, its position and the images, so a test can
compute every value. A fault is chosen by name for each request: see `FAULTS` and `UNSEEN`. `tests/test_scoring.py`
compares the replies with those of a real server. The server also lists its model and decodes ids, as the preflight
requires.
"""

import asyncio
import base64
import json
import random
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from mmopd.modality import Encoder, PixelPolicy
from mmopd.modality.encode import expand
from mmopd.modality.pixels import open_image, to_rgb
from mmopd.records import Grid
from mmopd.serving.endpoint import Endpoint

Fault = str | None
FAULTS = {  # name of the fault: the cause that a client must name
    "500": "status",
    "429": "status",  # with the header Retry-After: `pause`
    "slow": "timeout",  # `SLOW` seconds
    "close": "connection",  # the connection ends without a reply
    "hang": "timeout",
    "garbage": "malformed",
    "truncated": "malformed",
    "short": "malformed",  # a row of log-probs is missing
    "abort": "malformed",  # no log-probs at all, as after a pause that aborts
    "wrong_ids": "ids",
    "double_expanded": "ids",
    "other_request": "ids",
    "shifted": "ids",  # log-probs of neighbouring ids: another vocabulary
    "nan": "non_finite",
    "null": "non_finite",
    "floor": "non_finite",  # what vLLM writes for -inf
    "positive": "non_finite",
}
UNSEEN = {  # faults that no single reply shows: the check of the preflight that catches each
    "blind": "image canary",  # ignores the image, although the ids are expanded
    "nondeterministic": "same score twice",
}
SLOW = 1.5


def logprob(token: int, position: int, images: Sequence[bytes]) -> float:
    """Return the log-prob of a token at a position of the expanded prompt and response."""
    return -((token * 31 + position * 7 + sum(len(i) + sum(i[-64:]) for i in images)) % 97) / 8 - 0.125


class FakeVLLM:
    """Run a fake server: `async with FakeVLLM(encoder, faults) as server`, then `server.endpoint`.

    Args:
        encoder: expands placeholders as the real server would.
        faults: maps the number of a request to the name of its fault, or None.
        delay: seconds before a reply.
        limit: tokens of its context; it refuses longer requests, and images that do not decode.
        pause: seconds that an overloaded server asks the client to wait.
    """

    def __init__(
        self,
        encoder: Encoder,
        faults: Callable[[int], Fault] = lambda n: None,
        *,
        key: str = "k",
        delay: float = 0.0,
        pause: int = 1,
        limit: int = 2048,
    ) -> None:
        self.encoder, self.faults, self.key, self.delay, self.pause = encoder, faults, key, delay, pause
        self.limit = limit
        self.requests: list[dict[str, Any]] = []
        self.in_flight = self.most_in_flight = 0
        self.port = 0
        self.version = "default"  # of its weights

    async def __aenter__(self) -> Self:
        self._connections: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(name="fake", url=f"http://127.0.0.1:{self.port}", model="tiny", api_key="k", role="teacher")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read a request and send its reply. Returns True if the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
        request = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or "{}")
        fault = self.faults(len(self.requests))
        self.requests.append(request)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep({"hang": 1e6, "slow": SLOW}.get(fault or "", self.delay))
        finally:
            self.in_flight -= 1
        if fault == "close":
            return False
        status, body = self._reply(head[0], headers, request, fault)
        if fault == "truncated":
            body = body[: len(body) // 2]
        pause = f"retry-after: {self.pause}\r\n" if status == 429 else ""
        head_out = (
            f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{pause}content-length: {len(body)}\r\n\r\n"
        )
        writer.write(head_out.encode() + body)
        await writer.drain()
        return status != 500  # uvicorn closes the connection after an exception

    def _reply(self, line: str, headers: dict[str, str], request: dict[str, Any], fault: Fault) -> tuple[int, bytes]:
        if headers.get("authorization") != f"Bearer {self.key}":
            return 401, b'{"error":"Unauthorized"}'
        if line == "GET /v1/models HTTP/1.1":
            return 200, json.dumps(
                {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": self.limit}]}
            ).encode()
        if line == "POST /detokenize HTTP/1.1":
            return 200, json.dumps({"prompt": self.encoder.tokenizer.decode(request["tokens"])}).encode()
        if line != "POST /inference/v1/generate HTTP/1.1":
            return 404, b'{"detail":"Not Found"}'
        if request["model"] != "tiny":
            return 404, _error("The model does not exist.", "NotFoundError", 404)
        if fault in ("500", "429"):
            return int(fault), _error("overloaded", "InternalServerError", int(fault))
        if fault == "garbage":
            return 200, b"<html>gateway</html>"
        images = [base64.b64decode(part["url"].partition(",")[2]) for part in request.get("content_parts", ())]
        try:
            for image in images:
                to_rgb(open_image(image))
        except OSError as error:
            return 400, _error(f"Failed to load image: {error}", "BadRequestError", 400)
        ids = self._expand(request["token_ids"], images)
        if len(ids) >= self.limit:
            message = f"The decoder prompt (length {len(ids)}) is longer than the maximum model length of {self.limit}."
            return 400, _error(message, "BadRequestError", 400)
        images = [] if fault == "blind" else images
        reply = _empty(headers.get("x-request-id", "?"), ids)
        settings = request["sampling_params"]
        if (k := settings.get("prompt_logprobs")) is not None:
            reply["prompt_logprobs"] = [None] + [
                _rows(t, i, images, k, len(self.encoder.tokenizer)) for i, t in enumerate(ids) if i
            ]
            reply["choices"] = [_choice(0, [1], None, "length")]
        else:
            reply["choices"] = [self._sample(i, len(ids), images, settings) for i in range(settings["n"])]
        _spoil(reply, fault)
        return 200, json.dumps(reply).encode()

    def _expand(self, ids: list[int], images: list[bytes]) -> list[int]:
        if not images:
            return ids
        token, pixels = self.encoder.image_token, self.encoder.pixels
        return list(expand(ids, {token: [[token] * pixels.tokens(self._grid(image, pixels)) for image in images]}))

    def _grid(self, image: bytes, pixels: PixelPolicy) -> Grid:
        return pixels.grid(*open_image(image).size)

    def _sample(self, index: int, start: int, images: list[bytes], settings: dict[str, Any]) -> dict[str, Any]:
        rng = random.Random(settings["seed"] + index)
        end = self.encoder.tokenizer.eos_token_id
        allowed = [i for i in range(len(self.encoder.tokenizer)) if str(i) not in settings["logit_bias"] and i != end]
        tokens = rng.choices(allowed, k=rng.randint(1, settings["max_tokens"]))
        finish = "length" if len(tokens) == settings["max_tokens"] else "stop"
        tokens += [end] * (finish == "stop")
        return _choice(
            index, tokens, [logprob(t, start + i, images) for i, t in enumerate(tokens)], finish, self.version
        )


def _error(message: str, kind: str, code: int) -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}}).encode()


def _row(value: float, rank: int = 1) -> dict[str, Any]:
    return {"logprob": value, "rank": rank, "decoded_token": None}


def _rows(token: int, position: int, images: Sequence[bytes], k: int, vocabulary: int) -> dict[str, Any]:
    """Return the rows of the prompt token and the k likeliest, as vLLM does: the token first, and only once."""
    values = {i: logprob(i, position, images) for i in range(vocabulary if k else 0)} | {
        token: logprob(token, position, images)
    }
    order = sorted(values, key=lambda i: (-values[i], i))
    return {str(i): _row(values[i], order.index(i) + 1) for i in dict.fromkeys((token, *order[:k]))}


def _empty(request_id: str, ids: list[int]) -> dict[str, Any]:
    absent = (
        "usage",
        "prompt_logprobs",
        "prompt_token_id_logprobs",
        "mm_placeholders",
        "metrics",
        "kv_transfer_params",
        "ec_transfer_params",
    )
    return {
        "request_id": f"generate-tokens-{request_id}",
        "model": "tiny",
        "created": 0,
        "prompt_token_ids": list(ids),
    } | {
        **dict.fromkeys((*absent, "kv_transfer_params", "ec_transfer_params")),
        "output_mode": "tokens",
        "choices": [],
    }


def _choice(
    index: int, tokens: list[int], logprobs: list[float] | None, finish: str, version: str = "default"
) -> dict[str, Any]:
    def entry(token: int, value: float) -> dict[str, Any]:
        one = {"token_id": token, "logprob": value, "rank": 1}
        return one | {"top_logprobs": [one]}

    names = version.split("+")  # "a+b": weights a sampled the first token, weights b the others
    borders = [*range(len(names)), len(tokens)]
    spans = [{"version": name, "start": a, "end": b} for name, a, b in zip(names, borders, borders[1:], strict=False)]
    content = None if logprobs is None else {"content": [entry(t, v) for t, v in zip(tokens, logprobs, strict=True)]}
    return {
        "index": index,
        "finish_reason": finish,
        "stop_reason": None,
        "token_ids": tokens,
        "routed_experts": None,
        "sampling_mask": None,
        "weight_versions": spans,
        "logprobs": content,
    }


def _spoil(reply: dict[str, Any], fault: Fault) -> None:
    """Make a good reply bad in the named way."""
    rows, ids = reply["prompt_logprobs"] or [], reply["prompt_token_ids"]
    values = {"nan": float("nan"), "null": None, "floor": -9999.0, "positive": 0.5}
    if fault in values and rows:
        rows[-1] = {token: _row(values[fault]) for token in rows[-1]}
    elif fault in values:
        reply["choices"][0]["logprobs"]["content"][-1]["logprob"] = values[fault]
    elif fault == "short":
        (rows or reply["choices"]).pop()
    elif fault == "abort":
        reply["prompt_logprobs"] = None
        reply["choices"] = [_choice(c["index"], [], [], "abort") for c in reply["choices"]]
    elif fault == "wrong_ids":
        ids[-1] += 1
    elif fault == "double_expanded":
        ids.insert(len(ids) // 2, ids[len(ids) // 2])
    elif fault == "other_request":
        reply["request_id"] = "generate-tokens-of-somebody-else"
    elif fault == "nondeterministic":
        for entry in (entry for row in rows if row for entry in row.values()):
            entry["logprob"] -= random.random()
    elif fault == "shifted" and rows:
        rows[-1] = {str(int(token) + 1): row for token, row in rows[-1].items()}
