"""Scoring by several replicas under faults: affinity, hedges, circuits, and pauses that a server asks for."""

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest
from fake_vllm import SLOW, FakeVLLM, logprob
from scoring import balances, fleet, one, processor_encoder, prompt, run

from mmopd.config import View
from mmopd.demo.world import additions, digit_sums
from mmopd.records import Score
from mmopd.serving import replicas
from mmopd.teacher.scorer import Scorer
from mmopd.teacher.view import BUILT_IN, encode_view


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return processor_encoder(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def images(encoder):
    rows = digit_sums("few", 12, 0)
    return [encoder.encode(prompt(row, "image", f"i/{i}", caption=f"{i} and {i}")) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def texts(encoder):
    return [encoder.encode(prompt(row, "text", f"t/{i}")) for i, row in enumerate(additions("few", 12, 0))]


@pytest.fixture(scope="module")
def text(texts):
    return texts[0]


def right(encoder, encoded, tokens, view="full"):
    shown = encode_view(encoder, encoded, view if isinstance(view, View) else BUILT_IN[view])
    return tuple(logprob(t, len(shown.expanded) + i, shown.prompt.images) for i, t in enumerate(tokens))


def test_the_responses_to_a_prompt_go_to_one_replica_and_prompts_to_all(encoder, images, texts):
    servers = [FakeVLLM(encoder, delay=0.05) for _ in range(3)]
    where = {id(s): [] for s in servers}

    async def work(scorer):
        for encoded in [*images, *texts]:
            await asyncio.gather(*(scorer.score(encoded, (i, 1)) for i in range(8)))
            for server in servers:
                where[id(server)].append(len(server.requests))

    _, counts = run(work, fleet([{"teacher": "a"}], a={}), {"a": servers}, encoder)
    grown = [[b - a for a, b in pairwise([0, *totals])] for totals in where.values()]
    assert all(sorted(by_replica) == [0, 0, 8] for by_replica in zip(*grown, strict=True)), "a group was split"
    for kind in (slice(0, len(images)), slice(len(images), None)):
        assert sum(any(by_group[kind]) for by_group in grown) > 1, "all prompts went to one replica"
    assert balances(counts, 8 * (len(images) + len(texts)))


def test_a_replica_that_is_much_busier_than_the_others_does_not_get_all_of_a_large_group(encoder, images):
    servers = [FakeVLLM(encoder, delay=0.05) for _ in range(3)]

    async def work(scorer):
        await asyncio.gather(*(scorer.score(images[0], (i, 1)) for i in range(60)))

    run(work, fleet([{"teacher": "a"}], a={"concurrency": 64}), {"a": servers}, encoder)
    most = sorted(s.most_in_flight for s in servers)
    assert most[2] - most[0] <= replicas.SLACK + 1
    assert most[0] >= 10


def test_a_late_answer_is_asked_for_elsewhere_and_counts_once(encoder, text, monkeypatch):
    monkeypatch.setattr(replicas, "LATE_AT_LEAST", 0.1)
    slow = {"on": False}
    servers = [FakeVLLM(encoder, lambda n: "slow" if slow["on"] else None), FakeVLLM(encoder)]

    async def work(scorer):
        await asyncio.gather(*(scorer.score(text, (i, 1)) for i in range(replicas.LATE_AFTER + 10)))
        slow["on"] = True
        began = time.monotonic()
        late = await asyncio.gather(*(scorer.score(text, (i, 2)) for i in range(10)))
        return late, time.monotonic() - began

    (late, seconds), counts = run(work, fleet([{"teacher": "a"}], a={}), {"a": servers}, encoder)
    assert [r.logprobs for r in late] == [right(encoder, text, (i, 2)) for i in range(10)]
    assert seconds < SLOW
    assert 1 <= counts["hedged"] == counts["cancelled"]
    assert balances(counts, replicas.LATE_AFTER + 20)


def test_a_replica_that_is_always_late_is_left_alone(encoder, text, monkeypatch):
    monkeypatch.setattr(replicas, "LATE_AT_LEAST", 0.05)
    slow = {"on": False}
    servers = [FakeVLLM(encoder, lambda n: "hang" if slow["on"] else None), FakeVLLM(encoder)]

    async def work(scorer):
        await asyncio.gather(*(scorer.score(text, (i, 1)) for i in range(replicas.LATE_AFTER)))
        slow["on"], before = True, len(servers[0].requests)
        for i in range(40):
            assert isinstance(await scorer.score(text, (i, 2)), Score)
        return len(servers[0].requests) - before

    hung, counts = run(work, fleet([{"teacher": "a"}], a={"timeout": 30}), {"a": servers}, encoder)
    assert hung <= replicas.BREAK_AFTER + 3
    assert balances(counts, replicas.LATE_AFTER + 40)


def test_one_replica_alone_is_not_hedged(encoder, text, monkeypatch):
    monkeypatch.setattr(replicas, "LATE_AT_LEAST", 0.01)
    server = FakeVLLM(encoder, lambda n: "slow" if n == 30 else None)

    async def work(scorer):
        for i in range(32):
            await scorer.score(text, (i, 1))

    _, counts = run(work, fleet([{"teacher": "a"}], a={"timeout": 10}), {"a": [server]}, encoder)
    assert counts["hedged"] == counts["cancelled"] == 0
    assert len(server.requests) == 32


def test_a_replica_that_is_killed_loses_no_score_and_is_used_again_when_it_is_back(encoder, text, monkeypatch):
    monkeypatch.setattr(replicas, "COOLDOWN", (0.05, 0.2))

    async def main():
        async with AsyncExitStack() as stack:
            good, mortal = await stack.enter_async_context(FakeVLLM(encoder, delay=0.02)), FakeVLLM(encoder, delay=0.2)
            async with mortal:
                endpoints = {"a": [good.endpoint, mortal.endpoint]}
                scorer = await stack.enter_async_context(
                    Scorer(fleet([{"teacher": "a"}], a={}), {}, endpoints, encoder)
                )
                scores = asyncio.gather(*(scorer.score(text, (i, 1)) for i in range(100)))
                while not mortal.in_flight:
                    await asyncio.sleep(0.01)
                died_with = mortal.in_flight
            results, before, mortal.delay = await scores, len(mortal.requests), 0.0
            async with mortal:  # restarts on the same port
                await asyncio.sleep(0.2)
                results += await asyncio.gather(*(scorer.score(text, (i, 2)) for i in range(100)))
            return results, scorer.counts, died_with, len(mortal.requests) - before

    results, counts, died_with, again = asyncio.run(asyncio.wait_for(main(), 60))
    assert [r.logprobs for r in results] == [right(encoder, text, (i, k)) for k in (1, 2) for i in range(100)]
    assert counts["failed/connection"] >= died_with > 0
    assert again > 10
    assert balances(counts, 200)


def test_a_replica_that_failed_once_gets_its_share_again(encoder, texts, monkeypatch):
    monkeypatch.setattr(replicas, "COOLDOWN", (0.05, 1.0))
    servers = [FakeVLLM(encoder, lambda n: "500" if n == 0 else None), FakeVLLM(encoder)]

    async def work(scorer):
        await asyncio.gather(*(scorer.score(text, (1, 1)) for text in texts))
        await asyncio.sleep(0.1)
        for i in range(4):  # one request at a time: the other replica always has room
            for text in texts:
                await scorer.score(text, (i, 2))

    _, counts = run(work, fleet([{"teacher": "a"}], a={}), {"a": servers}, encoder)
    assert counts["failed/status"] == 1
    assert min(len(server.requests) for server in servers) >= 8


def test_who_waits_for_a_server_that_hangs_does_not_look_all_the_time_whether_it_is_his_turn(
    encoder, text, monkeypatch
):
    looks, is_free = Counter(), replicas.Replica.is_free
    monkeypatch.setattr(replicas.Replica, "is_free", lambda *args: looks.update(n=1) or is_free(*args))
    server = FakeVLLM(encoder, lambda n: "hang")

    async def work(scorer):
        return await asyncio.gather(*(scorer.score(text, (i, 1)) for i in range(600)))

    results, counts = run(work, fleet([{"teacher": "a"}], a={"timeout": 2}), {"a": [server]}, encoder)
    assert {r.cause for r in results} == {"timeout"}
    assert looks["n"] < 10 * 600
    assert balances(counts, 600)


def test_a_pause_that_a_server_asks_for_holds_nobody_up_who_can_go_elsewhere(encoder, text):
    busy, good = FakeVLLM(encoder, lambda n: "429" if n == 3 else None, pause=5), FakeVLLM(encoder)

    async def work(scorer):
        began = time.monotonic()
        first = await asyncio.gather(*(scorer.score(text, (i, 1)) for i in range(40)))
        before = len(busy.requests)
        second = await asyncio.gather(*(scorer.score(text, (i, 2)) for i in range(40)))
        assert time.monotonic() - began < 3
        return first + second, len(busy.requests) - before

    (results, meanwhile), counts = run(work, fleet([{"teacher": "a"}], a={}), {"a": [busy, good]}, encoder)
    assert [r.logprobs for r in results] == [right(encoder, text, (i, k)) for k in (1, 2) for i in range(40)]
    assert meanwhile == 0, "the pause is for everybody, whatever else the server has answered"
    assert counts["failed/status"] == 1
    assert balances(counts, 80)


def test_a_server_that_asks_for_a_pause_gets_it(encoder, text):
    times = []

    def fault(n):
        times.append(time.monotonic())
        return "429" if n == 0 else None

    result, counts = run(
        one(text), fleet([{"teacher": "a"}], a={"timeout": 20}), {"a": [FakeVLLM(encoder, fault)]}, encoder
    )
    assert isinstance(result, Score)
    assert times[1] - times[0] >= 1.0
    assert counts["failed/status"] == 1
    assert balances(counts, 1)


def test_the_status_says_who_waits_and_how_long_answers_take(encoder, texts):
    server = FakeVLLM(encoder, delay=0.05)

    async def work(scorer):
        calls = [asyncio.create_task(scorer.score(texts[0], (i, 1))) for i in range(5)]
        during = [scorer.status()]
        while not all(call.done() for call in calls):
            await asyncio.sleep(0.01)
            during.append(scorer.status())
        return during, scorer.status()

    (during, after), _ = run(work, fleet([{"teacher": "a"}], a={"concurrency": 1}), {"a": [server]}, encoder)
    busy = [(pool["waiting"], pool["replicas"][0]["in_flight"]) for [pool] in during]
    assert (4, 1) in busy
    [pool] = after
    [replica] = pool["replicas"]
    assert (pool["waiting"], replica["in_flight"], replica["answered"], replica["faults"]) == (0, 0, 5, 0)
    assert 0.05 <= replica["median"] <= replica["late"]
