"""Scoring by one teacher with the fake server: values, requests, faults, replicas and counts."""

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from fake_vllm import FAULTS, FakeVLLM, logprob
from scoring import TOKENS, balances, processor_encoder, prompt

from mmopd.config import Fleet
from mmopd.demo.world import additions, digit_sums
from mmopd.errors import UserError
from mmopd.records import Absent, Score
from mmopd.serving import replicas
from mmopd.teacher.scorer import Scorer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return processor_encoder(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def image(encoder):
    return encoder.encode(prompt(digit_sums("few", 1, 0)[0], "image"))


@pytest.fixture(scope="module")
def text(encoder):
    return encoder.encode(prompt(additions("few", 1, 0)[0], "text"))


def fleet(view="full", **limits):
    return Fleet.model_validate(
        {"teachers": {"t": {"endpoints": ["http://t"], **limits}}, "routes": [{"teacher": "t", "view": view}]}
    )


def right(encoded, tokens, images=None):
    images = encoded.prompt.images if images is None else images
    return tuple(logprob(t, len(encoded.expanded) + i, images) for i, t in enumerate(tokens))


def score_all(encoder, jobs, *servers, view="full", **limits):
    """Score all (encoded, tokens) concurrently. Returns (results, counts, requests that each server saw)."""

    async def main():
        async with AsyncExitStack() as stack:
            for server in servers:
                await stack.enter_async_context(server)
            scorer = await stack.enter_async_context(
                Scorer(fleet(view, **limits), {}, {"t": [s.endpoint for s in servers]}, encoder)
            )
            results = await asyncio.gather(*(scorer.score(encoded, tokens) for encoded, tokens in jobs))
            return results, scorer.counts, [len(s.requests) for s in servers]

    return asyncio.run(asyncio.wait_for(main(), 120))


def test_text_and_image_are_scored_token_by_token(encoder, image, text):
    results, counts, _ = score_all(encoder, [(image, TOKENS), (text, TOKENS)], FakeVLLM(encoder))
    assert results == [Score("t", right(image, TOKENS)), Score("t", right(text, TOKENS))]
    assert counts == {"asked": 2, "scored": 2, "answers": 2, "requests": 2, "unshared": 2}


def test_the_text_view_sends_no_image_and_no_placeholder_and_keeps_the_response(encoder, image):
    server = FakeVLLM(encoder)
    results, _, _ = score_all(encoder, [(image, TOKENS)], server, view="text")
    sent = server.requests[0]
    assert "content_parts" not in sent
    assert encoder.image_token not in sent["token_ids"]
    assert sent["token_ids"][-4:] == list(TOKENS)
    assert "What is their sum?" in encoder.tokenizer.decode(sent["token_ids"])
    shorter = len(sent["token_ids"]) - len(TOKENS)
    assert results == [Score("t", tuple(logprob(t, shorter + i, ()) for i, t in enumerate(TOKENS)))]


def test_equal_responses_are_scored_once_and_others_are_not_mixed_up(encoder, image, text):
    other = encoder.encode(prompt(digit_sums("few", 2, 1)[1], "image"))  # the same ids with another image
    assert other.ids == image.ids
    jobs = [(image, TOKENS)] * 5 + [(other, TOKENS)] * 2 + [(image, TOKENS[:3]), (text, TOKENS)]
    results, counts, requests = score_all(encoder, jobs, FakeVLLM(encoder, delay=0.05))
    assert [r.logprobs for r in results] == [right(e, t) for e, t in jobs]
    assert requests == [4]
    assert counts["reused"] == 5
    assert balances(counts, 9)


def test_a_score_is_remembered_but_an_absent_one_is_asked_for_again(encoder, image):
    async def main():
        server = FakeVLLM(encoder, lambda n: "wrong_ids" if n == 0 else None)
        async with server, Scorer(fleet(), {}, {"t": [server.endpoint]}, encoder) as scorer:
            return [await scorer.score(image, TOKENS) for _ in range(4)], scorer.counts, len(server.requests)

    results, counts, requests = asyncio.run(main())
    assert isinstance(results[0], Absent)
    assert results[1:] == [Score("t", right(image, TOKENS))] * 3
    assert requests == 2
    assert balances(counts, 4)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_makes_the_score_absent_by_its_cause(encoder, image, fault):
    (result,), counts, _ = score_all(encoder, [(image, TOKENS)], FakeVLLM(encoder, lambda n: fault), timeout=1)
    assert isinstance(result, Absent)
    assert result.cause == FAULTS[fault]
    assert result.teacher == "t"
    assert result.detail
    assert counts[f"absent/{FAULTS[fault]}"] == 1
    assert balances(counts, 1)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_healthy_replica_carries_the_run(encoder, image, fault):
    bad, good = FakeVLLM(encoder, lambda n: fault), FakeVLLM(encoder)
    jobs = [(image, (i, i + 1, i + 2)) for i in range(40)]
    results, counts, _ = score_all(encoder, jobs, bad, good, timeout=2, concurrency=4)
    assert [getattr(r, "logprobs", r) for r in results] == [right(e, t) for e, t in jobs]
    assert balances(counts, 40)
    assert counts["scored"] == 40
    assert sum(v for k, v in counts.items() if k.startswith("failed/")) == counts[f"failed/{FAULTS[fault]}"] > 0
    assert len(bad.requests) < 20, "a replica that fails must be left alone"


@pytest.mark.parametrize(("key", "model", "says"), [("other", "tiny", "401"), ("k", "misspelt", "404")])
def test_an_expired_key_or_a_wrong_model_is_told_without_the_key(encoder, image, key, model, says):
    async def main():
        async with FakeVLLM(encoder, key=key) as server:
            endpoint = type(server.endpoint)(
                "t.0", server.endpoint.url, model, "a-secret" if key == "other" else "k", "teacher"
            )
            async with Scorer(fleet(), {}, {"t": [endpoint]}, encoder) as scorer:
                return await scorer.score(image, TOKENS), len(server.requests)

    result, requests = asyncio.run(main())
    assert isinstance(result, Absent)
    assert result.cause == "status"
    assert says in result.detail
    assert "a-secret" not in repr(result)
    assert requests == 1


@pytest.mark.parametrize(("key", "model"), [("other", "tiny"), ("k", "misspelt")])
def test_a_healthy_replica_carries_the_run_if_another_refuses_the_key_or_the_model(encoder, image, key, model):
    async def main():
        async with FakeVLLM(encoder) as good, FakeVLLM(encoder) as bad:
            refused = replace(bad.endpoint, api_key=key, model=model)
            async with Scorer(fleet(), {}, {"t": [good.endpoint, refused]}, encoder) as scorer:
                return (
                    await asyncio.gather(*(scorer.score(image, (i, 1)) for i in range(40))),
                    scorer.counts,
                    len(bad.requests),
                )

    results, counts, requests = asyncio.run(main())
    assert [r.logprobs for r in results] == [right(image, (i, 1)) for i in range(40)]
    assert counts["failed/status"] == requests < 40
    assert balances(counts, 40)


def test_no_replica_gets_more_than_its_share_at_once(encoder, image):
    servers = [FakeVLLM(encoder, delay=0.02) for _ in range(2)]
    _, counts, requests = score_all(encoder, [(image, (i, 1)) for i in range(60)], *servers, concurrency=5)
    assert [s.most_in_flight for s in servers] == [5, 5]
    assert min(requests) > 20
    assert balances(counts, 60)


def test_a_server_that_comes_back_loses_no_score(encoder, image):
    async def main():
        server = FakeVLLM(encoder)
        async with server:
            endpoint = server.endpoint
        async with Scorer(fleet(timeout=20), {}, {"t": [endpoint]}, encoder) as scorer:
            scores = asyncio.gather(*(scorer.score(image, (i, 1)) for i in range(20)))
            await asyncio.sleep(1.0)
            async with server:
                return await scores, scorer.counts

    results, counts = asyncio.run(asyncio.wait_for(main(), 60))
    assert all(isinstance(r, Score) for r in results)
    assert counts["failed/connection"] > 0
    assert balances(counts, 20)


def test_a_dead_teacher_holds_nobody_up_for_longer_than_its_timeout(encoder, image):
    async def main():
        async with FakeVLLM(encoder) as server:
            endpoint = server.endpoint
        async with Scorer(fleet(timeout=1, concurrency=4), {}, {"t": [endpoint]}, encoder) as scorer:
            return await asyncio.gather(*(scorer.score(image, (i, 1)) for i in range(200))), scorer.counts

    results, counts = asyncio.run(asyncio.wait_for(main(), 20))
    assert {r.cause for r in results} == {"connection"}
    assert counts["requests"] < 50, "an open circuit must spare a dead server"
    assert balances(counts, 200)


def test_a_caller_that_is_cancelled_takes_nothing_from_the_others(encoder, image):
    async def main():
        async with (
            FakeVLLM(encoder, delay=0.1) as server,
            Scorer(fleet(), {}, {"t": [server.endpoint]}, encoder) as scorer,
        ):
            first, second = (asyncio.create_task(scorer.score(image, TOKENS)) for _ in range(2))
            await asyncio.sleep(0.03)
            first.cancel()
            return await second, len(server.requests)

    assert asyncio.run(main()) == (Score("t", right(image, TOKENS)), 1)


def test_two_thousand_requests_under_random_faults_balance_exactly(encoder, image, text, monkeypatch):
    monkeypatch.setattr(replicas, "COOLDOWN", (0.02, 0.2))
    rng = random.Random(0)
    faults = [f for f in FAULTS if f != "hang"]
    servers = [
        FakeVLLM(encoder, lambda n: rng.choice(faults) if rng.random() < 0.2 else None, pause=0) for _ in range(3)
    ]
    jobs = [(rng.choice([image, text]), (rng.randrange(900), rng.randrange(3))) for _ in range(2000)]
    results, counts, requests = score_all(encoder, jobs, *servers, concurrency=16, timeout=60)
    assert balances(counts, 2000)
    assert (
        0 <= counts["requests"] - sum(requests) <= counts["failed/connection"]
    )  # sent on a connection that had just been closed
    assert Counter("scored" if isinstance(r, Score) else f"absent/{r.cause}" for r in results) == {
        k: v for k, v in counts.items() if k == "scored" or k.startswith("absent/")
    }
    assert all(r.logprobs == right(e, t) for r, (e, t) in zip(results, jobs, strict=True) if isinstance(r, Score))
    assert counts["scored"] > 1900


def test_a_routed_teacher_without_an_endpoint_is_named(encoder):
    with pytest.raises(UserError, match="'t' has no endpoint"):
        Scorer(fleet(), {}, {}, encoder)
