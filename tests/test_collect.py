"""A step's rollouts: a response is scored as soon as it is finished, draws depend only on their names, and some
responses are also scored without images.
"""

import asyncio
import time

import pytest
from fake_vllm import SLOW, FakeVLLM

from mmopd.config import Fleet, Recipe
from mmopd.demo.world import additions, build_processor, digit_sums
from mmopd.modality import Encoder
from mmopd.records import Outcome, Prompt, Score
from mmopd.rollout.collect import SHORT, collect, seed_of, version_of
from mmopd.rollout.student_client import EngineError, StudentClient
from mmopd.teacher.scorer import Scorer
from mmopd.train.recorder import staleness


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    return Encoder(folder)


@pytest.fixture(scope="module")
def prompts(encoder):
    rows = [("image", row) for row in digit_sums("few", 4, 0)] + [("text", row) for row in additions("few", 4, 0)]
    return [
        encoder.encode(Prompt(f"{kind}/{i}", kind, kind, tuple(row["messages"]), tuple(row["images"]), row["answer"]))
        for i, (kind, row) in enumerate(rows)
    ]


class Verifiers:
    """Verifiers that judge every answer right, and record when in `times`."""

    def __init__(self):
        self.times = []

    async def verify(self, task, response, answer):
        self.times.append(time.monotonic())
        return Outcome(1.0)


def step(encoder, prompts, *, student, group=4, max_tokens=SHORT + 1, visual=None, number=0, version=None, ahead=0):
    """Run a step. Returns (samples, seconds, times of the scores, requests to the student)."""
    student.version = version or version_of(number)
    recipe = Recipe.model_validate(
        {
            "student": {"model": "m"},
            "fleet": "f",
            "mixture": "m",
            "rollout": {"prompts": len(prompts), "group": group, "max_tokens": max_tokens, "async_steps": ahead},
            "algorithm": {"visual": visual},
        }
    )
    fleet = Fleet.model_validate({"teachers": {"t": {"endpoints": ["http://t"]}}, "routes": [{"teacher": "t"}]})
    verifiers, teacher = Verifiers(), FakeVLLM(encoder)

    async def main():
        async with (
            student,
            teacher,
            StudentClient(student.endpoint, encoder) as engine,
            Scorer(fleet, {}, {"t": [teacher.endpoint]}, encoder) as scorer,
        ):
            began = time.monotonic()
            share = list(enumerate(prompts))
            samples, _ = await collect(
                share,
                rollout=recipe.rollout,
                seed=recipe.seed,
                visual=recipe.algorithm.visual,
                step=number,
                engines=[engine],
                scorer=scorer,
                verifiers=verifiers,
            )
            return (
                samples,
                time.monotonic() - began,
                [t - began for t in verifiers.times],
                student.requests,
                teacher.requests,
            )

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_a_response_is_scored_and_verified_while_others_of_its_group_are_still_being_generated(encoder, prompts):
    slow = FakeVLLM(encoder, lambda n: "slow" if n == 0 else None)
    samples, seconds, times, requests, _ = step(encoder, prompts[:1], student=slow)
    assert len(samples) == len(requests) == 4
    assert all(isinstance(sample.score, Score) for sample in samples)
    assert sum(t < SLOW / 2 for t in times) == 3, "the three that were finished waited for the fourth"
    assert SLOW <= seconds < SLOW + 1


def test_short_responses_of_a_group_come_in_one_request_and_are_the_same_as_one_by_one(encoder, prompts):
    alone, _, _, single, _ = step(encoder, prompts, student=FakeVLLM(encoder), max_tokens=SHORT + 1)
    assert len(single) == 4 * len(prompts)
    seeds = [(tuple(r["token_ids"]), r["sampling_params"]["seed"]) for r in single]
    _, _, _, together, _ = step(encoder, prompts, student=FakeVLLM(encoder), max_tokens=SHORT)
    assert len(together) == len(prompts)
    drawn = [
        (tuple(r["token_ids"]), r["sampling_params"]["seed"] + i)
        for r in together
        for i in range(r["sampling_params"]["n"])
    ]
    assert sorted(drawn) == sorted(seeds)
    assert [sample.group for sample in alone] == [i for i in range(len(prompts)) for _ in range(4)]


def test_samples_come_in_the_order_of_their_prompts_whatever_is_finished_first(encoder, prompts):
    uneven = FakeVLLM(encoder, lambda n: "slow" if n % 5 == 0 else None)
    first = step(encoder, prompts, student=uneven)[0]
    second = step(encoder, prompts, student=FakeVLLM(encoder))[0]
    assert [(s.group, s.response.tokens) for s in first] == [(s.group, s.response.tokens) for s in second]


def test_the_stated_share_of_the_responses_to_images_is_scored_blind_and_no_other(encoder, prompts):
    samples, _, _, _, requests = step(
        encoder, prompts, student=FakeVLLM(encoder), group=64, max_tokens=8, visual={"share": 0.25}
    )
    of_images = [s for s in samples if prompts[s.group].prompt.images]
    blind = [s for s in samples if s.blind is not None]
    assert {id(s) for s in blind} <= {id(s) for s in of_images}
    assert 0.17 < len(blind) / len(of_images) < 0.33
    assert all(isinstance(s.blind, Score) and s.blind.logprobs != s.score.logprobs for s in blind)
    again = step(encoder, prompts, student=FakeVLLM(encoder), group=64, max_tokens=8, visual={"share": 0.25})[0]
    assert [s.blind is not None for s in again] == [s.blind is not None for s in samples], (
        "the draw must not depend on time or order"
    )
    other = step(encoder, prompts, student=FakeVLLM(encoder), group=64, max_tokens=8, visual={"share": 0.25}, number=1)[
        0
    ]
    assert [s.blind is not None for s in other] != [s.blind is not None for s in samples]
    assert all(s.blind is None for s in step(encoder, prompts, student=FakeVLLM(encoder), max_tokens=8)[0])
    assert len(requests) >= len(blind)


def test_what_was_sampled_by_other_weights_than_the_steps_own_is_refused_and_leaves_nothing_running(encoder, prompts):
    student = FakeVLLM(encoder, lambda n: "slow" if n else None)
    with pytest.raises(EngineError, match="sampled from weights 'default' in step 3: it was started again"):
        step(encoder, prompts, student=student, number=3, version="default")
    assert student.in_flight == 0
    with pytest.raises(EngineError, match="'step-2' in step 3"):
        step(encoder, prompts, student=FakeVLLM(encoder), number=3, version="step-2")


def test_rollouts_that_run_ahead_may_have_weights_that_are_one_update_older(encoder, prompts):
    samples = step(encoder, prompts, student=FakeVLLM(encoder), number=3, version="step-2", ahead=1)[0]
    assert staleness(samples, 3) == 1
    assert staleness(step(encoder, prompts, student=FakeVLLM(encoder), number=3, ahead=1)[0], 3) == 0
    # Requests that were preempted.
    mixed, *_ = step(encoder, prompts, student=FakeVLLM(encoder), number=3, version="step-2+step-3", ahead=1)
    assert staleness(mixed, 3) == len(mixed) / sum(len(sample.response.tokens) for sample in mixed)
    with pytest.raises(EngineError, match="'step-2' in step 3"):
        step(encoder, prompts, student=FakeVLLM(encoder), number=3, version="step-2+step-3")
    with pytest.raises(EngineError, match="'step-1' in step 3"):
        step(encoder, prompts, student=FakeVLLM(encoder), number=3, version="step-1", ahead=1)


def test_each_of_several_engines_samples_the_same_share_of_the_groups_on_all_ranks(encoder, prompts):
    recipe = Recipe.model_validate(
        {
            "student": {"model": "m", "replicas": 2},
            "mixture": "m",
            "rollout": {"prompts": len(prompts), "group": 4, "max_tokens": 8},
            "algorithm": {"objective": {"kind": "grpo"}},
        }
    )

    async def of_rank(rank, servers):
        async with (
            servers[0],
            servers[1],
            StudentClient(servers[0].endpoint, encoder) as a,
            StudentClient(servers[1].endpoint, encoder) as b,
        ):
            share = list(enumerate(prompts))[rank::2]
            await collect(
                share,
                rollout=recipe.rollout,
                seed=recipe.seed,
                visual=recipe.algorithm.visual,
                step=0,
                engines=[a, b],
                verifiers=Verifiers(),
            )
            return [sorted(request["sampling_params"]["seed"] for request in server.requests) for server in servers]

    async def main():
        found = []
        for rank in range(2):
            servers = FakeVLLM(encoder), FakeVLLM(encoder)
            for server in servers:
                server.version = version_of(0)
            found.append(await of_rank(rank, servers))
        return found

    first, second = asyncio.run(asyncio.wait_for(main(), 60))
    seeds = [seed_of(recipe.seed, 0, encoded.prompt.key) for encoded in prompts]
    assert first == [sorted(seeds[0::2]), []]
    assert second == [[], sorted(seeds[1::2])]
