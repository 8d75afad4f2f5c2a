"""Scoring by several teachers, views and replicas under faults: a score is exact, absent, or refused, and all counts
add up.

`test_scoring_wire.py` tests each fault separately. A single reply cannot show a server that is blind or answers at
random: the scorer accepts it here, and the preflight catches it. `test_examination.py` has more of these.
"""

import asyncio
import random
from dataclasses import replace

import pytest
from fake_vllm import FAULTS, UNSEEN, FakeVLLM, logprob
from scoring import TOKENS, balances, fleet, one, processor_encoder, prompt, run

from mmopd.config import View
from mmopd.demo.world import additions, digit_sums
from mmopd.errors import UserError
from mmopd.preflight.questions import look
from mmopd.preflight.run import preflight
from mmopd.records import Absent, Prompt, Score
from mmopd.serving import replicas
from mmopd.task import Task
from mmopd.teacher.scorer import Scorer
from mmopd.teacher.view import BUILT_IN, blinded, encode_view


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return processor_encoder(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def images(encoder):
    rows = digit_sums("few", 12, 0)
    return [encoder.encode(prompt(row, "image", f"i/{i}", caption=f"{i} and {i}")) for i, row in enumerate(rows)]


@pytest.fixture(scope="module")
def text(encoder):
    return encoder.encode(prompt(additions("few", 1, 0)[0], "text", "t/0"))


def right(encoder, encoded, tokens, view="full"):
    shown = encode_view(encoder, encoded, view if isinstance(view, View) else BUILT_IN[view])
    return tuple(logprob(t, len(shown.expanded) + i, shown.prompt.images) for i, t in enumerate(tokens))


def test_several_teachers_give_the_mean_of_their_log_probs_by_their_shares_each_with_its_view(encoder, images):
    routed = fleet([{"teacher": {"a": 3, "b": 1}}], a={"weight": 2.0}, b={"weight": 4.0, "view": "text"})
    result, counts = run(one(images[0]), routed, {"a": [FakeVLLM(encoder)], "b": [FakeVLLM(encoder)]}, encoder)
    a, b = right(encoder, images[0], TOKENS), right(encoder, images[0], TOKENS, "text")
    assert a != b
    assert result.logprobs == pytest.approx([0.75 * x + 0.25 * y for x, y in zip(a, b, strict=True)])
    assert (result.teacher, result.weight) == ("a+b", 2.5)
    assert balances(counts, 1)
    assert counts["answers"] == 2


def test_without_one_of_its_teachers_a_response_has_no_score_since_the_target_must_not_change(encoder, text):
    routed = fleet([{"teacher": {"a": 1, "b": 1}}], a={"timeout": 1}, b={"timeout": 1})
    result, counts = run(
        one(text), routed, {"a": [FakeVLLM(encoder)], "b": [FakeVLLM(encoder, lambda n: "nan")]}, encoder
    )
    assert isinstance(result, Absent)
    assert (result.teacher, result.cause) == ("b", "non_finite")
    assert balances(counts, 1)


def test_a_row_without_the_text_of_its_view_is_absent_by_that_cause_and_costs_no_request(encoder, images, text):
    bare = encoder.encode(Prompt("i/x", "image", "image", images[0].prompt.messages, images[0].prompt.images, "1"))
    server = FakeVLLM(encoder)
    routed = fleet([{"teacher": "a"}], a={"view": "caption"})

    async def both(scorer):
        return await asyncio.gather(scorer.score(bare, TOKENS), scorer.score(images[3], TOKENS))

    (missing, there), counts = run(both, routed, {"a": [server]}, encoder)
    assert (missing.cause, missing.teacher) == ("view", "a")
    assert "caption" in missing.detail
    assert there == Score("a", right(encoder, images[3], TOKENS, "caption"))
    assert "3 and 3" in encoder.tokenizer.decode(server.requests[0]["token_ids"])
    assert balances(counts, 2)
    assert counts["absent/view"] == 1


def test_a_task_may_have_a_view_of_its_own(encoder, images):
    tasks = {"image_task": Task("image_task", "image", views={"told": View(hint=" It is {answer}.")})}
    server = FakeVLLM(encoder)
    routed = fleet([{"teacher": "a", "view": "told"}], a={})
    result, _ = run(one(images[0]), routed, {"a": [server]}, encoder, tasks)
    assert f"It is {images[0].prompt.answer}." in encoder.tokenizer.decode(server.requests[0]["token_ids"])
    assert result.logprobs == right(encoder, images[0], TOKENS, tasks["image_task"].views["told"])


def test_a_blind_score_is_that_of_the_same_prompt_with_blank_images(encoder, images, text):
    routed = fleet([{"teacher": "a", "modality": "image"}, {"teacher": "b"}], a={}, b={"view": "text"})
    servers = {"a": [FakeVLLM(encoder)], "b": [FakeVLLM(encoder)]}

    async def work(scorer):
        assert scorer.sees_image(images[0])
        assert not scorer.sees_image(text)
        return await scorer.score(images[0], TOKENS, blind=True)

    result, _ = run(work, routed, servers, encoder)
    assert result.logprobs == right(encoder, images[0], TOKENS, blinded(View()))
    assert result.logprobs != right(encoder, images[0], TOKENS)


def test_the_likeliest_tokens_are_given_on_request_in_addition_to_the_responses_own(encoder, images, text):
    async def both(scorer):
        return await asyncio.gather(scorer.score(images[0], TOKENS), scorer.score(text, TOKENS))

    results, _ = run(both, fleet([{"teacher": "a"}], a={}), {"a": [FakeVLLM(encoder)]}, encoder, top_k=5)
    for encoded, result in zip((images[0], text), results, strict=True):
        assert result.logprobs == right(encoder, encoded, TOKENS)
        for i, top in enumerate(result.top):
            at = len(encoded.expanded) + i
            every = sorted((logprob(t, at, encoded.prompt.images) for t in range(len(encoder.tokenizer))), reverse=True)
            assert sorted(top.values(), reverse=True) == every[:5]
            assert all(logprob(t, at, encoded.prompt.images) == value for t, value in top.items())


def test_the_likeliest_tokens_of_several_teachers_are_refused_with_the_reason(encoder):
    routed = fleet([{"teacher": {"a": 1, "b": 1}}], a={}, b={})
    endpoints = {"a": [FakeVLLM(encoder).endpoint], "b": [FakeVLLM(encoder).endpoint]}
    with pytest.raises(UserError, match="the 5 likeliest tokens of a, b cannot be mixed"):
        Scorer(routed, {}, endpoints, encoder, top_k=5)


@pytest.mark.parametrize("fault", UNSEEN)
def test_what_no_reply_shows_is_caught_by_the_preflight(encoder, images, fault):
    server = FakeVLLM(encoder, lambda n: fault)
    routed = fleet([{"teacher": "a"}], a={})
    result, _ = run(one(images[0]), routed, {"a": [server]}, encoder)
    assert isinstance(result, Score), "the client cannot know"
    assert result.logprobs != right(encoder, images[0], TOKENS)
    kinds = look({"digits": [encoded.prompt for encoded in images]}, encoder)

    async def examine():
        async with server:
            return await preflight(routed, {}, {"a": [server.endpoint]}, encoder, kinds, max_tokens=8)

    assert [check.name for check in asyncio.run(examine()) if check.state == "fail"] == [UNSEEN[fault]]


def test_a_caller_that_is_cancelled_while_it_waits_for_a_view_takes_nothing_from_the_others(encoder, images):
    async def work(scorer):
        first, second = (asyncio.create_task(scorer.score(images[1], TOKENS)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    result, _ = run(work, fleet([{"teacher": "a"}], a={"view": "blank"}), {"a": [FakeVLLM(encoder)]}, encoder)
    assert result.logprobs == right(encoder, images[1], TOKENS, "blank")


def test_two_thousand_requests_with_overlap_views_hedges_and_random_faults_balance_exactly(
    encoder, images, text, monkeypatch
):
    monkeypatch.setattr(replicas, "COOLDOWN", (0.02, 0.2))
    monkeypatch.setattr(replicas, "LATE_AT_LEAST", 0.2)
    rng = random.Random(0)
    a, b = (
        [
            FakeVLLM(encoder, lambda n: rng.choice(list(FAULTS)) if rng.random() < 0.1 else None, pause=0)
            for _ in range(n)
        ]
        for n in (3, 2)
    )
    routed = fleet(
        [{"teacher": {"a": 1, "b": 1}, "task": "both"}, {"teacher": "b", "task": "captioned"}, {"teacher": "a"}],
        a={"concurrency": 16, "timeout": 8},
        b={"concurrency": 16, "timeout": 8, "view": "caption"},
    )
    both = [encoder.encode(replace(e.prompt, task="both")) for e in images[:2]]
    bare = encoder.encode(replace(images[2].prompt, task="captioned", extra={}))  # never has a score
    jobs = [
        (rng.choice([*both, *images[3:5], text]), (rng.randrange(900), rng.randrange(3)), rng.random() < 0.2)
        for _ in range(1990)
    ]
    jobs += [(bare, TOKENS, False)] * 10

    async def work(scorer):
        return await asyncio.gather(*(scorer.score(e, t, blind=blind and scorer.sees_image(e)) for e, t, blind in jobs))

    results, counts = run(work, routed, {"a": a, "b": b}, encoder)
    assert balances(counts, 2000)
    assert counts["hedged"] > 0
    assert counts["absent/view"] == 10
    assert counts["scored"] == sum(isinstance(r, Score) for r in results) > 1900
    there = [(result, *job) for result, job in zip(results, jobs, strict=True) if isinstance(result, Score)]
    for result, encoded, tokens, blind in there:
        view = blinded(View()) if blind and encoded in images else "full"
        parts = [right(encoder, encoded, tokens, view)] + [right(encoder, encoded, tokens, "caption")] * (
            encoded in both
        )
        assert result.logprobs == tuple(sum(at) / len(parts) for at in zip(*parts, strict=True))
