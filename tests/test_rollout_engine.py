import asyncio

import pytest
from fake_vllm import FakeVLLM, logprob

from mmopd.demo.world import build_processor, digit_sums
from mmopd.modality import Encoder
from mmopd.records import Prompt
from mmopd.rollout.student_client import EngineError, StudentClient


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    return Encoder(folder)


@pytest.fixture(scope="module")
def encoded(encoder):
    row = digit_sums("few", 1, 0)[0]
    return encoder.encode(
        Prompt("digits/0", "digits", "image", tuple(row["messages"]), tuple(row["images"]), row["answer"])
    )


def sample(encoder, encoded, faults=lambda n: None, **limits):
    async def main():
        async with FakeVLLM(encoder, faults) as server, StudentClient(server.endpoint, encoder, **limits) as engine:
            return await engine.sample(encoded, 8, 5, max_tokens=3), server.requests

    return asyncio.run(main())


def test_a_group_is_one_request_and_its_responses_carry_what_the_trainer_needs(encoder, encoded):
    responses, requests = sample(encoder, encoded)
    assert len(requests) == 1
    assert len(responses) == 8
    end = encoder.tokenizer.eos_token_id
    for response in responses:
        assert response.versions == (("default", len(response.tokens)),)
        assert (response.finish == "stop") == (response.tokens[-1] == end)
        assert response.text == encoder.decode(response.tokens)
        start = len(encoded.expanded)
        assert response.logprobs == tuple(
            logprob(t, start + i, encoded.prompt.images) for i, t in enumerate(response.tokens)
        )
    assert {r.finish for r in responses} == {"stop", "length"}


def test_special_tokens_are_banned_except_the_end_token_and_those_that_reasoning_models_write(encoder, encoded):
    _, requests = sample(encoder, encoded)
    names = {encoder.tokenizer.convert_ids_to_tokens(int(i)) for i in requests[0]["sampling_params"]["logit_bias"]}
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|im_start|>", "<|endoftext|>"} <= names
    assert names.isdisjoint({"<|im_end|>", "<think>", "</think>", "<tool_call>"})


@pytest.mark.parametrize("fault", ["500", "429", "close", "garbage", "truncated", "abort"])
def test_a_passing_fault_costs_a_retry_and_nothing_else(encoder, encoded, fault):
    responses, requests = sample(encoder, encoded, lambda n: fault if n < 2 else None)
    assert len(requests) == 3
    assert responses == sample(encoder, encoded)[0]


@pytest.mark.parametrize("fault", ["500", "wrong_ids", "nan", "short", "hang"])
def test_an_engine_that_stays_bad_stops_the_run_with_a_message(encoder, encoded, fault):
    with pytest.raises(EngineError, match=r"could not sample prompt digits/0"):
        sample(encoder, encoded, lambda n: fault, timeout=0.6, patience=0.5)


def test_a_dead_engine_is_given_up_after_the_patience(encoder, encoded):
    async def main():
        async with FakeVLLM(encoder) as server:
            endpoint = server.endpoint
        async with StudentClient(endpoint, encoder, patience=0.5) as engine:
            await engine.logprobs(encoded, (5, 6))

    with pytest.raises(EngineError, match="connection"):
        asyncio.run(asyncio.wait_for(main(), 20))


def test_log_probs_for_the_probe_are_those_of_the_response_tokens(encoder, encoded):
    async def main():
        async with FakeVLLM(encoder) as server, StudentClient(server.endpoint, encoder) as engine:
            return await engine.logprobs(encoded, (5, 6, 7))

    start = len(encoded.expanded)
    assert asyncio.run(main()) == [logprob(t, start + i, encoded.prompt.images) for i, t in enumerate((5, 6, 7))]
