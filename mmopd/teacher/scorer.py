"""Scoring: the log-prob that a teacher gives to each token of a response, or an `Absent` with the reason for its
absence.

Scoring is token-exact: it uses ids and image bytes (see `serving.wire`). It runs on replicas that may fail (see
`serving.replicas`). A score depends only on (teacher, what it is shown, response), so that equal requests are computed
once: short answers repeat often in a group.
"""

import asyncio
import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from operator import mul
from types import TracebackType
from typing import Any, Self

from cachetools import LRUCache

from mmopd.config import Fleet, View
from mmopd.errors import ConfigError
from mmopd.modality import Encoder
from mmopd.records import Absent, Encoded, Score
from mmopd.serving import wire
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.replicas import ReplicaPool, connect
from mmopd.task.base import Task
from mmopd.teacher.router import RoutedTeacher, find_teachers
from mmopd.teacher.score_cache import ScoreCache
from mmopd.teacher.view import BUILT_IN, ViewError, blinded, encode_view, sees_image

CACHE_TOKENS = 1_000_000  # log-probs to remember; about 32 MB
CACHE_VIEWS = 256  # rewritten prompts to keep


class Scorer:
    """Scores responses with the teachers of a fleet. An async context manager; it lives in one event loop.

    Attributes:
        counts: `asked` counts the calls of `score`: `asked` = `scored` + sum of `absent/<cause>`. `answers` counts the
            answers of single teachers; `reused` is the part that needed no request. `requests` counts the requests
            sent; some `failed/<cause>`, some were `cancelled`: `answers` - `reused` = `requests` - failed - cancelled.
            `hedged` counts the requests sent because another was late. `unshared` counts the replies of servers that
            compute a prompt anew for each response.

    Args:
        fleet: teachers and routes.
        tasks: by name; a task may have views of its own.
        endpoints: the replicas of each teacher, by its name in the fleet.
        encoder: the student's encoder, which gives the ids that a teacher must have seen.
        top_k: number of the likeliest ids to request at each position (`Score.top`).
        kept: scores from before the run was resumed; new ones are added to it (not with `top_k`).

    Raises:
        ConfigError: a teacher that a route leads to has no endpoint. Or `top_k` is used and a route has several
            teachers: their likeliest ids differ, so their mean is unknown.
    """

    def __init__(
        self,
        fleet: Fleet,
        tasks: Mapping[str, Task],
        endpoints: Mapping[str, Sequence[Endpoint]],
        encoder: Encoder,
        *,
        top_k: int = 0,
        kept: ScoreCache | None = None,
    ) -> None:
        if top_k and (shared := next((route for route in fleet.routes if len(route.teachers) > 1), None)):
            names = ", ".join(shared.teachers)
            raise ConfigError(
                f"the {top_k} likeliest tokens of {names} cannot be mixed, because each teacher reports only its own; "
                "change the route to one teacher"
            )
        self._used = sorted({name for route in fleet.routes for name in route.teachers})
        for name in self._used:
            if not endpoints.get(name):
                raise ConfigError(
                    f"teacher {name!r} has no endpoint; start its server before the run, or set its `endpoints` in "
                    "the fleet"
                )
        self.counts: Counter[str] = Counter()
        self._fleet = fleet
        self._tasks = tasks
        self._endpoints = endpoints
        self._encoder = encoder
        self._top_k = top_k
        self._kept = None if top_k else kept
        self._routed: dict[tuple[str, str], tuple[RoutedTeacher, ...]] = {}  # by task and modality
        self._shown: LRUCache[tuple[int, View], tuple[Encoded, asyncio.Task[Encoded]]] = LRUCache(CACHE_VIEWS)
        self._known: LRUCache[bytes, wire.Scored] = LRUCache(CACHE_TOKENS, getsizeof=_size)
        self._running: dict[bytes, asyncio.Task[wire.Scored | Absent]] = {}
        self._pools: dict[str, ReplicaPool] = {}

    async def __aenter__(self) -> Self:
        self._http = connect()
        for name in self._used:
            teacher = self._fleet.teachers[name]
            limits = {"timeout": teacher.timeout, "patience": teacher.timeout}
            self._pools[name] = ReplicaPool(
                self._endpoints[name], self._http, **limits, concurrency=teacher.concurrency, counts=self.counts
            )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(
            *self._running.values(), *(view for _, view in self._shown.values()), return_exceptions=True
        )
        await self._http.close()

    def status(self) -> list[dict[str, Any]]:
        """Return what the replicas of each teacher do now; any thread may call this."""
        return [pool.status() for pool in self._pools.values()]

    def sees_image(self, encoded: Encoded) -> bool:
        """Return true if the prompt has items of media and all its teachers are shown them."""
        return encoded.prompt.is_visual and all(sees_image(teacher.view) for teacher in self._teachers_of(encoded))

    async def score(self, encoded: Encoded, tokens: tuple[int, ...], *, blind: bool = False) -> Score | Absent:
        """Return the score of a response (its ids, end token included) by the teachers that its prompt is routed to.

        With several teachers it is the mean of their log-probs, weighted by their shares. If one of them gives none,
        there is no score, since the target must not change from response to response. Never raises for a failure of a
        teacher.

        Args:
            encoded: the prompt.
            tokens: ids of the response.
            blind: show blank images in place of the prompt's.
        """
        teachers = self._teachers_of(encoded)
        name = "+".join(teacher.name for teacher in teachers)
        self.counts["asked"] += 1
        parts = await asyncio.gather(*(self._score_by(teacher, encoded, tokens, blind=blind) for teacher in teachers))
        answers = [part for part in parts if not isinstance(part, Absent)]
        self.counts["answers"] += len(answers)
        if len(answers) < len(parts):
            failed = next(part for part in parts if isinstance(part, Absent))
            self.counts[f"absent/{failed.cause}"] += 1
            return failed
        self.counts["scored"] += 1
        if len(teachers) == 1:
            return Score(name, answers[0].logprobs, teachers[0].weight, answers[0].top)
        shares = [teacher.share for teacher in teachers]
        mixed = (sum(map(mul, shares, at)) for at in zip(*(answer.logprobs for answer in answers), strict=True))
        return Score(name, tuple(mixed), sum(teacher.share * teacher.weight for teacher in teachers))

    def _teachers_of(self, encoded: Encoded) -> tuple[RoutedTeacher, ...]:
        kind = encoded.prompt.task, encoded.prompt.modality
        if kind not in self._routed:
            self._routed[kind] = find_teachers(self._fleet, self._tasks, *kind)
        return self._routed[kind]

    async def _score_by(
        self, teacher: RoutedTeacher, encoded: Encoded, tokens: tuple[int, ...], *, blind: bool
    ) -> wire.Scored | Absent:
        try:
            shown = await self._show(encoded, blinded(teacher.view) if blind else teacher.view)
        except ViewError as fault:
            return Absent(teacher.name, "view", str(fault), of_prompt=True)
        others = (files for items in shown.prompt.others.values() for files in items)
        images = _digest([*shown.prompt.images, *map(_digest, others)])
        ids = array("q", shown.ids).tobytes()
        key = _digest([teacher.name.encode(), images, ids, array("q", tokens).tobytes()])
        result: wire.Scored | Absent
        if known := self._known.get(key) or self._remember(key):
            self.counts["reused"] += 1
            result = known
        elif running := self._running.get(key):
            result = await asyncio.shield(running)
            self.counts["reused"] += not isinstance(result, Absent)
        else:
            asked = self._ask(teacher.name, shown, tokens, _digest([images, ids]))
            task = self._running[key] = asyncio.create_task(asked)
            task.add_done_callback(partial(self._finish, key))
            result = await asyncio.shield(task)  # shielded: a cancelled caller does not cancel it for the others
        return result

    async def _show(self, encoded: Encoded, view: View) -> Encoded:
        """Return the prompt under a view, made once for all responses of its group; a thread redraws the images."""
        if view == BUILT_IN["full"]:
            return encoded
        key = (id(encoded), view)
        # The cached value also holds the prompt, so that its id cannot be reused by another object.
        if (found := self._shown.get(key)) is None:
            found = self._shown[key] = (
                encoded,
                asyncio.create_task(asyncio.to_thread(encode_view, self._encoder, encoded, view)),
            )
        return await asyncio.shield(found[1])

    async def _ask(self, teacher: str, shown: Encoded, tokens: tuple[int, ...], prompt: bytes) -> wire.Scored | Absent:
        def build(model: str) -> bytes:
            return wire.scoring_body(model, shown, tokens, self._top_k)

        def parse(reply: bytes, request_id: str) -> wire.Scored:
            return wire.parse_scored(reply, request_id, shown.expanded, tokens, self._top_k)

        try:
            scored = await self._pools[teacher].call(build, parse, affinity=prompt)
        except wire.ReplyError as fault:
            return Absent(teacher, fault.cause, fault.detail, fault.of_prompt)
        if not scored.shares_prompts:
            self.counts["unshared"] += 1
        return scored if scored.top is None else self._within_head(scored, scored.top)

    def _within_head(self, scored: wire.Scored, top: Sequence[Mapping[int, float]]) -> wire.Scored:
        """Return a score without the likeliest ids beyond the student's head, and count those."""
        head = self._encoder.head
        within = tuple({token: logprob for token, logprob in at.items() if token < head} for at in top)
        self.counts["beyond_head"] += sum(map(len, top)) - sum(map(len, within))
        return wire.Scored(scored.logprobs, within)

    def _finish(self, key: bytes, task: "asyncio.Task[wire.Scored | Absent]") -> None:
        del self._running[key]
        if task.cancelled() or task.exception():
            return
        result = task.result()
        if not isinstance(result, Absent):
            if self._kept is not None:
                self._kept.add(key, result.logprobs)
            if _size(result) < CACHE_TOKENS:
                self._known[key] = result

    def _remember(self, key: bytes) -> wire.Scored | None:
        """Return a score from before the run was resumed."""
        found = self._kept.get(key) if self._kept is not None else None
        return None if found is None else wire.Scored(found)


def _digest(parts: Iterable[bytes]) -> bytes:
    """Return a digest of several parts; the length of each part is hashed before it."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _size(scored: wire.Scored) -> int:
    """Return the number of log-probs, at least 1."""
    return max(1, len(scored.logprobs) + sum(map(len, scored.top or ())))
