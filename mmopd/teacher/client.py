"""Scoring: the log-prob that a teacher gives to each token of a response, or an `Absent` that says why there is none.

Token-exact, by ids and image bytes (see `wire`); over replicas that may fail (see `pool`). A score depends on nothing but
(teacher, what it is shown, response), so that what is asked twice is computed once: short answers repeat a lot in a group.
"""

import asyncio
import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from cachetools import LRUCache

from mmopd.config import Fleet
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.records import Absent, Encoded, Score
from mmopd.teacher import wire
from mmopd.teacher.endpoint import Endpoint
from mmopd.teacher.pool import Pool, connect
from mmopd.teacher.router import find_route, show

CACHE_TOKENS = 1_000_000  # response tokens whose scores are remembered; about 32 MB


class Scorer:
    """Scores responses with the teachers of a fleet. An async context manager; it lives in one event loop.

    Attributes:
        counts: `asked` = `scored` + sum of `absent/<cause>`, one for each call of `score`; `reused` of the scored ones cost no
            request; `requests` were sent, of which `failed/<cause>` failed.

    Args:
        fleet: teachers and routes.
        endpoints: the replicas of each teacher, by its name in the fleet.
        encoder: the student's, which says what ids a teacher must have seen.

    Raises:
        UserError: a teacher that a route leads to has no endpoint.
    """

    def __init__(self, fleet: Fleet, endpoints: Mapping[str, Sequence[Endpoint]], encoder: Encoder) -> None:
        for name in sorted({route.teacher for route in fleet.routes}):
            if not endpoints.get(name):
                raise UserError(f"teacher {name!r} has no endpoint; it must be served before the run, or name its `endpoints`")
        self.counts: Counter[str] = Counter()
        self._fleet, self._endpoints, self._encoder = fleet, endpoints, encoder
        self._known: LRUCache[bytes, Score] = LRUCache(CACHE_TOKENS, getsizeof=lambda score: max(1, len(score.logprobs)))
        self._running: dict[bytes, asyncio.Task[Score | Absent]] = {}
        self._pools: dict[str, Pool] = {}

    async def __aenter__(self) -> Self:
        self._http = connect()
        for name, replicas in self._endpoints.items():
            teacher = self._fleet.teachers[name]
            limits = {"timeout": teacher.timeout, "patience": teacher.timeout}
            self._pools[name] = Pool(replicas, self._http, **limits, concurrency=teacher.concurrency, counts=self.counts)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.close()

    async def score(self, encoded: Encoded, tokens: tuple[int, ...]) -> Score | Absent:
        """The score of a response (its ids, end token included) by the teacher that its prompt is routed to.

        Never raises for what a teacher does or fails to do.
        """
        route = find_route(self._fleet, encoded.prompt.task, encoded.prompt.modality)
        shown = encoded if route.view == "full" else self._encoder.encode(show(encoded.prompt, route.view))
        key = _digest(route.teacher, shown, tokens)
        self.counts["asked"] += 1
        result: Score | Absent
        if known := self._known.get(key):
            self.counts["reused"] += 1
            result = known
        elif running := self._running.get(key):
            result = await asyncio.shield(running)
            self.counts["reused"] += isinstance(result, Score)
        else:
            task = self._running[key] = asyncio.create_task(self._ask(route.teacher, shown, tokens))
            task.add_done_callback(partial(self._finish, key))
            result = await asyncio.shield(task)  # a caller that is cancelled takes nothing from the others
        self.counts["scored" if isinstance(result, Score) else f"absent/{result.cause}"] += 1
        return result

    async def _ask(self, teacher: str, shown: Encoded, tokens: tuple[int, ...]) -> Score | Absent:
        def build(model: str) -> bytes:
            return wire.scoring_body(model, shown.ids, shown.prompt.images, tokens)

        def parse(reply: bytes, request_id: str) -> tuple[float, ...]:
            return wire.parse_scores(reply, request_id, shown.expanded, tokens)

        try:
            return Score(teacher, await self._pools[teacher].call(build, parse))
        except wire.ReplyError as fault:
            return Absent(teacher, fault.cause, fault.detail)

    def _finish(self, key: bytes, task: "asyncio.Task[Score | Absent]") -> None:
        del self._running[key]
        if task.cancelled() or task.exception():
            return
        result = task.result()
        if isinstance(result, Score) and len(result.logprobs) < CACHE_TOKENS:
            self._known[key] = result


def _digest(teacher: str, shown: Encoded, tokens: Sequence[int]) -> bytes:
    """Of everything that a score depends on; each part is preceded by its length."""
    digest = hashlib.blake2b(digest_size=16)
    for part in (teacher.encode(), array("q", shown.ids).tobytes(), array("q", tokens).tobytes(), *shown.prompt.images):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
