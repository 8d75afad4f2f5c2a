import base64
import json
from dataclasses import replace

import pytest

from mmopd.records import Encoded, Prompt
from mmopd.serving import wire
from mmopd.serving.shared_prompts import PROMPT


def reply(**changes):
    good = {
        "request_id": "generate-tokens-r1",
        "prompt_token_ids": [1, 2, 2, 3],
        "prompt_logprobs": [
            None,
            *({str(t): {"logprob": -float(t), "rank": 1, "decoded_token": None}} for t in (2, 2, 3)),
        ],
        "choices": [],
    }
    return json.dumps(good | changes).encode()


def choice(index=0, tokens=(5, 9), finish="stop", logprobs=(-0.5, -0.25), versions=("step-3",)):
    borders = [*range(len(versions)), len(tokens)]
    return {
        "index": index,
        "finish_reason": finish,
        "token_ids": list(tokens),
        "logprobs": {
            "content": [{"token_id": t, "logprob": lp, "rank": 1} for t, lp in zip(tokens, logprobs, strict=True)]
        },
        "weight_versions": [
            {"version": v, "start": a, "end": b} for v, a, b in zip(versions, borders, borders[1:], strict=False)
        ],
    }


def encoded(ids, images=()):
    return Encoded(Prompt("s/0", "t", "image" if images else "text", (), images, ""), tuple(ids), (), ())


SAMPLING = wire.Sampling(n=2, seed=7, temperature=0.7, top_p=0.9, top_k=5, max_tokens=64, banned=(11, 12))


def test_a_scoring_request_holds_unexpanded_ids_and_the_very_bytes_of_the_images():
    shown = replace(encoded([1, 2], (b"\x00\xff image",)), expanded=(1, 2, 2, 2))
    body = json.loads(wire.scoring_body("tiny", shown, [3, 4]))
    assert body["token_ids"] == [1, 2, 3, 4]
    assert body["sampling_params"] == {
        "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False, "extra_args": {PROMPT: 4},
    }  # fmt: skip
    assert body["return_token_ids"] is True
    url = body["content_parts"][0]["url"]
    assert url.startswith("data:")
    assert base64.b64decode(url.partition(",")[2]) == b"\x00\xff image"
    assert "content_parts" not in json.loads(wire.scoring_body("tiny", encoded([1]), [3]))


def test_a_sampling_request_states_every_setting_so_that_no_default_of_the_server_applies():
    settings = json.loads(wire.sampling_body("tiny", encoded([1]), SAMPLING))["sampling_params"]
    assert settings["logit_bias"] == {"11": -100.0, "12": -100.0}
    assert {k: settings[k] for k in ("n", "seed", "temperature", "top_p", "top_k", "max_tokens", "logprobs")} == {
        "n": 2, "seed": 7, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "max_tokens": 64, "logprobs": 0,
    }  # fmt: skip


def test_scores_are_those_of_the_response_alone():
    assert wire.parse_scores(reply(), "r1", [1, 2, 2], [3]) == (-3.0,)
    assert wire.parse_scores(reply(), "r1", [1], [2, 2, 3]) == (-2.0, -2.0, -3.0)
    assert wire.parse_scores(reply(), "r1", [1, 2, 2, 3], []) == ()


def test_a_server_that_shares_prompts_returns_the_rows_of_the_response_alone():
    rows = [None, {"2": {"logprob": -2.0}}, {"3": {"logprob": -3.0, "rank": 1}}]
    assert wire.parse_scored(reply(prompt_logprobs=rows), "r1", [1, 2], [2, 3]).logprobs == (-2.0, -3.0)
    assert wire.parse_scored(reply(prompt_logprobs=rows), "r1", [1, 2], [2, 3]).shares_prompts
    assert wire.parse_scored(reply(prompt_logprobs=[None]), "r1", [1, 2, 2, 3], []).shares_prompts
    assert not wire.parse_scored(reply(), "r1", [1, 2], [2, 3]).shares_prompts


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"prompt_token_ids": [1, 2, 2, 2, 3]}, "ids"),
        ({"prompt_token_ids": [1, 2, 2]}, "ids"),
        ({"request_id": "generate-tokens-r2"}, "ids"),
        ({"prompt_logprobs": [None, None, None, {"4": {"logprob": -1.0}}]}, "ids"),
        ({"prompt_logprobs": [None, None, None, None]}, "ids"),
        ({"prompt_logprobs": [None, {"2": {"logprob": -1.0}}]}, "ids"),  # the row of another position
        ({"prompt_logprobs": [None, None]}, "ids"),
        ({"prompt_logprobs": [None]}, "malformed"),  # fewer rows than the response has tokens
        ({"prompt_logprobs": []}, "malformed"),
        ({"prompt_logprobs": [None, {"2": {"logprob": -1.0}}, {"3": {"logprob": -1.0}}]}, "malformed"),
        ({"prompt_logprobs": None}, "malformed"),
        ({"prompt_logprobs": [None, None, None, {"3": {"logprob": "x"}}]}, "malformed"),
        ({"prompt_logprobs": [None, None, None, {"3": {"logprob": None}}]}, "non_finite"),
        ({"prompt_logprobs": [None, None, None, {"3": {"logprob": float("nan")}}]}, "non_finite"),
        ({"prompt_logprobs": [None, None, None, {"3": {"logprob": float("-inf")}}]}, "non_finite"),
        ({"prompt_logprobs": [None, None, None, {"3": {"logprob": -9999.0}}]}, "non_finite"),
        ({"prompt_logprobs": [None, None, None, {"3": {"logprob": 2.0}}]}, "non_finite"),
    ],
)
def test_a_reply_that_is_not_the_score_of_these_tokens_is_refused(changes, cause):
    with pytest.raises(wire.ReplyError) as error:
        wire.parse_scores(reply(**changes), "r1", [1, 2, 2], [3])
    assert error.value.cause == cause


@pytest.mark.parametrize("data", [b"", b"<html>", b"[]", b"null", b'{"request_id":', b"\xff\xfe", reply()[:-30]])
def test_what_is_no_reply_at_all_is_malformed_and_worth_another_try(data):
    with pytest.raises(wire.ReplyError) as error:
        wire.parse_scores(data, "r1", [1, 2, 2], [3])
    assert error.value.cause == "malformed"
    assert error.value.transient


def test_sampled_responses_come_in_order_with_their_end_token_and_weight_version():
    data = reply(choices=[choice(1, (5, 6), "length", (-1.0, -2.0), ("step-3", "step-4")), choice(0)])
    first, second = wire.parse_samples(data, "r1", [1, 2, 2, 3], SAMPLING, 9)
    assert first == wire.Choice((5, 9), (-0.5, -0.25), "stop", (("step-3", 2),))
    assert second == wire.Choice((5, 6), (-1.0, -2.0), "length", (("step-3", 1), ("step-4", 1)))


@pytest.mark.parametrize(
    ("bad", "cause"),
    [
        (choice(1, finish="abort"), "malformed"),
        (choice(1, (), "length", ()), "malformed"),
        (choice(2), "malformed"),
        (choice(1) | {"token_ids": [5, 5, 9]}, "malformed"),
        (choice(1) | {"logprobs": None}, "malformed"),
        (choice(1, (12, 9)), "ids"),  # banned
        (choice(1, (5, 6)), "ids"),  # stopped, but not at the end token
        (choice(1, logprobs=(-0.5, -9999.0)), "non_finite"),
    ],
)
def test_a_response_that_a_trainer_could_not_use_is_refused(bad, cause):
    with pytest.raises(wire.ReplyError) as error:
        wire.parse_samples(reply(choices=[choice(0), bad]), "r1", [1, 2, 2, 3], SAMPLING, 9)
    assert error.value.cause == cause
