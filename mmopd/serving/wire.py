"""JSON of vLLM's `POST /inference/v1/generate`, the only route that takes token ids and images together.

Prompt ids are sent unexpanded (one placeholder per item of a medium), with the files of the row. The server expands
them. A reply is accepted only if the ids that it returns are the expected ones. Replies are decoded with typed msgspec
structs, so that only the rows of the response become Python objects.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

import msgspec
from cachetools import LRUCache, cached

from mmopd.modality.base import Medium
from mmopd.modality.registry import shown_items
from mmopd.records import Encoded, Files
from mmopd.serving.shared_prompts import PROMPT

PATH = "/inference/v1/generate"
REQUEST_ID = "X-Request-Id"  # header; comes back in the reply's `request_id`
FLOOR = -9999.0  # vLLM's value for -inf, and for NaN of a sampled token
CEILING = 1e-3  # 0 plus rounding
PARTS_BYTES = 1 << 27  # size of the cache of encoded items
BAN = -100.0  # logit bias; the strongest that OpenAI-style servers accept


class ReplyError(Exception):
    """A reply that must not be used, or a missing reply.

    Attributes:
        cause: connection, timeout, status, malformed, ids or non_finite.
        detail: message for a person; contains no key.
        transient: true if the same replica may succeed a little later.
        pause: seconds for which the server asks to get no requests.
        of_prompt: true if the server answers, and refuses this prompt or reads it in another way.
    """

    def __init__(
        self, cause: str, detail: str, *, transient: bool = False, pause: float = 0.0, of_prompt: bool = False
    ) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause = cause
        self.detail = detail
        self.transient = transient
        self.pause = pause
        self.of_prompt = of_prompt


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings for sampling n responses; `banned` ids are never sampled."""

    n: int
    seed: int
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    banned: Collection[int]


@dataclass(frozen=True, slots=True)
class Choice:
    """A sampled response as the server returns it."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]  # under the unscaled, unbiased distribution
    finish: str  # stop | length
    # Weight versions in order, each with the number of tokens that it sampled; () if unknown.
    versions: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """Log-probs of the T tokens of a response from a server."""

    logprobs: tuple[float, ...]  # [T]
    # [T] id -> log-prob of the K likeliest ids, if they were requested.
    top: tuple[Mapping[int, float], ...] | None = None
    # The server has mmopd's plugin: it computes a prompt once for all its responses.
    shares_prompts: bool = False


def scoring_body(model: str, encoded: Encoded, tokens: Sequence[int], top_k: int = 0) -> bytes:
    """Return the request for the log-probs of `tokens` after a prompt, and of the `top_k` likeliest ids at each of
    them. A server with mmopd's plugin computes the prompt once for all its responses (`serving.shared_prompts`).
    """
    settings = {"max_tokens": 1, "prompt_logprobs": top_k, "detokenize": False}
    return _body(model, encoded, tokens, {**settings, "extra_args": {PROMPT: len(encoded.expanded)}})


def sampling_body(model: str, encoded: Encoded, sampling: Sampling) -> bytes:
    """Return the request for `n` responses to a prompt; vLLM draws response i with seed `seed + i`."""
    settings: dict[str, object] = {
        "n": sampling.n,
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "logprobs": 0,
        "detokenize": False,
        "logit_bias": dict.fromkeys(sampling.banned, BAN),
    }
    return _body(model, encoded, (), settings)


def parse_scores(reply: bytes, request_id: str, expanded: Sequence[int], tokens: Sequence[int]) -> tuple[float, ...]:
    """Return only the log-probs of `parse_scored`."""
    return parse_scored(reply, request_id, expanded, tokens).logprobs


def parse_scored(
    reply: bytes, request_id: str, expanded: Sequence[int], tokens: Sequence[int], top_k: int = 0
) -> Scored:
    """Return the log-prob of each of `tokens` after the prompt `expanded`, and of the `top_k` likeliest ids if
    requested.

    Raises:
        ReplyError: malformed, ids (the server saw another prompt, or answers another request) or non_finite.
    """
    scored = _decode(_SCORED, reply)
    expected = [*expanded, *tokens]
    _check_ids(scored, request_id, expected)
    returned = len(scored.prompt_logprobs) - 1  # the first row is empty
    if returned not in (len(tokens), len(expected) - 1):
        raise ReplyError(
            "malformed", f"{returned + 1} rows of log-probs for {len(expected)} tokens, {len(tokens)} of the response"
        )
    rows = [_decode(_ROW, row) for row in scored.prompt_logprobs[returned + 1 - len(tokens) :]]
    missing = [i for i, (row, token) in enumerate(zip(rows, tokens, strict=True)) if row is None or token not in row]
    if missing:
        raise ReplyError("ids", f"no log-prob for token {tokens[missing[0]]} at position {missing[0]} of the response")
    logprobs = _finite([row[token].logprob for row, token in zip(rows, tokens, strict=True) if row is not None])
    top = tuple(_likeliest(row or {}, top_k) for row in rows) if top_k else None
    return Scored(logprobs, top, shares_prompts=returned == len(tokens))


def parse_samples(reply: bytes, request_id: str, expanded: Sequence[int], sampling: Sampling, end: int) -> list[Choice]:
    """Return the `n` responses, in order; one that stopped by itself ends with the token `end`.

    Raises:
        ReplyError: malformed (also a response that was aborted), ids (also a banned token) or non_finite.
    """
    sampled = _decode(_SAMPLED, reply)
    _check_ids(sampled, request_id, list(expanded))
    choices = sorted(sampled.choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(sampling.n)):
        raise ReplyError("malformed", f"{len(choices)} responses, but {sampling.n} were requested")
    banned = frozenset(sampling.banned)
    return [_choice(choice, banned, end) for choice in choices]


class _Token(msgspec.Struct):
    logprob: float | None
    token_id: int = -1
    rank: int = 0  # 1 = the likeliest


class _Content(msgspec.Struct):
    content: list[_Token]


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Choice(msgspec.Struct):
    index: int
    finish_reason: str
    token_ids: list[int]
    logprobs: _Content
    weight_versions: list[_Span] | None = None


class _Reply(msgspec.Struct):
    request_id: str
    prompt_token_ids: list[int]


class _Scored(_Reply):
    prompt_logprobs: list[msgspec.Raw]


class _Sampled(_Reply):
    choices: list[_Choice]


_ENCODER = msgspec.json.Encoder()
_SCORED = msgspec.json.Decoder(_Scored)
_SAMPLED = msgspec.json.Decoder(_Sampled)
_ROW = msgspec.json.Decoder(dict[int, _Token] | None)
T = TypeVar("T")


def _body(model: str, encoded: Encoded, tokens: Sequence[int], settings: dict[str, object]) -> bytes:
    ids = [*encoded.ids, *tokens]
    body: dict[str, object] = {"model": model, "token_ids": ids, "sampling_params": settings, "return_token_ids": True}
    if encoded.prompt.is_visual:
        body["content_parts"] = [_part(medium, files) for medium, files in shown_items(encoded.prompt)]
    return _ENCODER.encode(body)


@cached(LRUCache(PARTS_BYTES, getsizeof=lambda part: len(bytes(part))), lock=Lock())
def _part(medium: Medium, files: Files) -> msgspec.Raw:
    """Return the JSON of an item with its own bytes; cached, so that a group makes it once."""
    return msgspec.Raw(b'{"type":"%b_url","url":"%b"}' % (medium.slot.encode(), medium.url(files)))


def _decode(decoder: "msgspec.json.Decoder[T]", data: bytes | msgspec.Raw) -> T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # NaN is not JSON, but a lenient server may write it
        cause = "non_finite" if b"NaN" in bytes(data) or b"Infinity" in bytes(data) else "malformed"
        raise ReplyError(
            cause, f"{error}; the reply begins {bytes(data)[:80]!r}", transient=cause == "malformed"
        ) from None


def _check_ids(reply: _Reply, request_id: str, expected: list[int]) -> None:
    if not reply.request_id.endswith(request_id):
        raise ReplyError("ids", f"a reply to request {reply.request_id}, not to {request_id}")
    got = reply.prompt_token_ids
    if got != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected))
        )
        raise ReplyError(
            "ids",
            f"the server saw {len(got)} prompt tokens, expected {len(expected)}; the first difference is at {at}",
            of_prompt=True,
        )


def _choice(choice: _Choice, banned: frozenset[int], end: int) -> Choice:
    tokens = choice.token_ids
    if choice.finish_reason not in ("stop", "length") or not tokens:
        raise ReplyError(
            "malformed", f"a response of {len(tokens)} tokens that finished by {choice.finish_reason!r}", transient=True
        )
    if not banned.isdisjoint(tokens):
        raise ReplyError(
            "ids", f"the banned token {min(banned.intersection(tokens))} was sampled: the server ignores logit_bias"
        )
    if choice.finish_reason == "stop" and tokens[-1] != end:
        raise ReplyError("ids", f"a response stopped at token {tokens[-1]}, not at the end token {end}")
    content = choice.logprobs.content
    if [token.token_id for token in content] != tokens:
        raise ReplyError("malformed", "the log-probs are not those of the response's tokens")
    versions = tuple((span.version, span.end - span.start) for span in choice.weight_versions or ())
    return Choice(tuple(tokens), _finite([token.logprob for token in content]), choice.finish_reason, versions)


def _likeliest(row: Mapping[int, _Token], k: int) -> Mapping[int, float]:
    ids = [token for token, entry in row.items() if 0 < entry.rank <= k]
    if len(ids) != k:
        raise ReplyError(
            "malformed",
            f"{len(ids)} of the {k} likeliest ids at a position; does the server allow as many (--max-logprobs)?",
        )
    return dict(zip(ids, _finite([row[token].logprob for token in ids]), strict=True))


def _finite(logprobs: Sequence[float | None]) -> tuple[float, ...]:
    finite = tuple(value for value in logprobs if value is not None and FLOOR < value <= CEILING)
    if len(finite) != len(logprobs):
        raise ReplyError(
            "non_finite",
            f"{len(logprobs) - len(finite)} of {len(logprobs)} are not log-probs (NaN, infinite or above 0)",
        )
    return finite
