"""Preflight of fake teachers: each fault is found by its own check, and an honest teacher passes all."""

import asyncio
import copy
import dataclasses
import io
import json
import time
from contextlib import AsyncExitStack

import pytest
from fake_teachers import IMAGE, TEXT, Blind, Liar, bad, of
from rich.console import Console
from scoring import processor_encoder, prompt

from mmopd.config import Fleet
from mmopd.demo.world import additions, digit_sums
from mmopd.errors import UserError
from mmopd.preflight.examination import CHUNK
from mmopd.preflight.questions import look
from mmopd.preflight.run import insist, preflight, save, summary

MAX_TOKENS = 24


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return processor_encoder(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def sources():
    return {
        "digits": [prompt(row, "image", f"digits/{i}") for i, row in enumerate(digit_sums("few", 12, 0))],
        "sums": [prompt(row, "text", f"sums/{i}") for i, row in enumerate(additions("few", 12, 0))],
    }


@pytest.fixture(scope="module")
def kinds(sources, encoder):
    return look(sources, encoder)


def fleet(view="full", **settings):
    teacher = {"endpoints": ["http://t"], "view": view, "timeout": 10, **settings}
    return Fleet.model_validate({"teachers": {"t": teacher}, "routes": [{"teacher": "t"}]})


def prove(encoder, kinds, *servers, view="full", endpoint=None, max_tokens=MAX_TOKENS, top_k=0, **settings):
    """Return the checks of a teacher that has these servers as its replicas."""

    async def main():
        async with AsyncExitStack() as stack:
            for server in servers:
                await stack.enter_async_context(server)
            replicas = [dataclasses.replace(server.endpoint, name=f"t.{i}") for i, server in enumerate(servers)]
            replicas = [endpoint(replica) for replica in replicas] if endpoint else replicas
            return await preflight(
                fleet(view, **settings), {}, {"t": replicas}, encoder, kinds, max_tokens=max_tokens, top_k=top_k
            )

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_an_honest_teacher_passes_everything(encoder, kinds):
    checks = prove(encoder, kinds, Liar(encoder), Liar(encoder))
    assert bad(checks) == []
    assert [check.name for check in checks] == [*IMAGE, *IMAGE, "same on replicas"]
    assert summary(checks, {"t": [None, None]}) == "1 teacher, 2 replicas: 19 checks passed"


@pytest.mark.parametrize(
    ("kind", "lie", "name", "says"),
    [
        (Liar, "shifted vocabulary", "vocabulary", "id 300 is"),
        (Liar, "two ids swapped", "vocabulary", "id 700 is"),
        (Liar, "double expansion", "image tokens", "odd (101x67): 11 image tokens on the server, 6 here"),
        (Liar, "500 with images", "image tokens", "EngineCore encountered an issue"),
        (Liar, "noise", "same score twice", "0.05 allowed"),
        (Blind, "blind", "image canary", "a blank image moves a log-prob by 0,"),
        (Blind, "bag of pixels", "image canary", "a shuffled one by 0;"),
    ],
)
def test_each_lie_is_caught_by_its_own_check_and_by_no_other(encoder, kinds, kind, lie, name, says):  # noqa: PLR0917
    checks = prove(encoder, kinds, kind(encoder, lie))
    assert bad(checks) == [("t.0", name, "fail")]
    assert says in of(checks, name).found
    assert of(checks, name).way_out


@pytest.mark.parametrize(("view", "says"), [("full", "more placeholders than images"), ("text", "becomes other ids")])
def test_a_gateway_that_tokenizes_the_prompt_again_is_caught_by_a_text_that_spells_control_tokens(
    encoder, kinds, view, says
):
    checks = prove(encoder, kinds, Liar(encoder, "tokenizes again"), view=view)
    assert ("t.0", "control tokens", "fail") in bad(checks)
    assert says in of(checks, "control tokens").found


def test_a_server_with_another_pixel_budget_is_told_by_the_size_that_differs(encoder, kinds):
    other = copy.copy(encoder)
    other.pixels = dataclasses.replace(encoder.pixels, max_pixels=encoder.pixels.max_pixels // 2)
    checks = prove(encoder, kinds, Liar(other))
    assert bad(checks) == [("t.0", "image tokens", "fail")]
    assert of(checks, "image tokens").found.startswith("over the budget (320x288): ")
    assert of(checks, "image tokens").numbers["server"] < of(checks, "image tokens").numbers["here"]


def test_the_longest_prompt_its_response_and_one_token_must_fit_exactly(encoder, kinds):
    longest = max(len(encoder.encode(p).expanded) for kind in kinds for p in kind.longest)
    need = longest + 100 + 1
    fits, short = (
        prove(encoder, kinds, server, max_tokens=100)
        for server in (Liar(encoder, length=need), Liar(encoder, length=need - 1))
    )
    assert bad(fits) == []
    assert bad(short) == [("t.0", "context", "fail")]
    assert of(short, "context").numbers == {"needed": need, "prompt": longest, "max_tokens": 100, "allowed": need - 1}
    assert "rollout.max_tokens to 99" in of(short, "context").way_out


def test_a_server_that_takes_less_than_it_says_is_caught_by_trying(encoder, kinds):
    class Optimist(Liar):
        def _reply(self, line, headers, request, fault):
            self.length = 4096 if line.startswith("GET") else 60
            return super()._reply(line, headers, request, fault)

    checks = prove(encoder, [kind for kind in kinds if kind.modality == "text"], Optimist(encoder), max_tokens=100)
    assert bad(checks) == [("t.0", "context", "fail")]
    assert "refused" in of(checks, "context").found


def test_the_context_is_measured_through_the_view(encoder, kinds):
    longest = max(len(encoder.encode(p).expanded) for kind in kinds for p in kind.longest)
    checks = prove(encoder, kinds, Liar(encoder), view="privileged")
    assert bad(checks) == []
    assert of(checks, "context").numbers["prompt"] > longest


def test_top_k_must_be_allowed_where_it_is_needed_and_only_there(encoder, kinds):
    assert bad(prove(encoder, kinds, Liar(encoder, top_k=5))) == []
    checks = prove(encoder, kinds, Liar(encoder, top_k=5), top_k=8)
    assert bad(checks) == [("t.0", "top-k", "fail")]
    assert "--max-logprobs 8" in of(checks, "top-k").way_out
    assert bad(prove(encoder, kinds, Liar(encoder, top_k=8), top_k=8)) == []


def test_replicas_that_disagree_are_named(encoder, kinds):
    checks = prove(encoder, kinds, Liar(encoder), Liar(encoder), Liar(encoder, "other weights"))
    assert bad(checks) == [("t", "same on replicas", "fail")]
    assert "t.2" in checks[-1].found


def test_a_replica_that_does_not_even_agree_with_itself_is_not_compared(encoder, kinds):
    assert bad(prove(encoder, kinds, Liar(encoder), Liar(encoder, "noise"))) == [("t.1", "same score twice", "fail")]


def test_a_refused_key_and_a_wrong_model_are_told_apart_without_the_key(encoder, kinds):
    expired = prove(
        encoder,
        kinds,
        Liar(encoder, key="new"),
        endpoint=lambda e: dataclasses.replace(e, api_key="a-secret"),
        api_key_env="KEY_OF_T",
    )
    assert [(c.name, c.state) for c in expired] == [("reachable", "fail")]
    assert "refuses the key (401)" in expired[0].found
    assert "KEY_OF_T" in expired[0].way_out
    assert "a-secret" not in repr(expired)
    misspelt = prove(encoder, kinds, Liar(encoder), endpoint=lambda e: dataclasses.replace(e, model="tinny"))
    assert [(c.name, c.state) for c in misspelt] == [("reachable", "fail")]
    assert misspelt[0].found == "it serves 'tiny', and not 'tinny'"


def test_a_dead_replica_is_told_and_the_others_are_examined(encoder, kinds):
    dead = lambda e: e if e.name == "t.0" else dataclasses.replace(e, url="http://127.0.0.1:9")  # noqa: E731
    checks = prove(encoder, kinds, Liar(encoder), Liar(encoder), endpoint=dead)
    assert bad(checks) == [("t.1", "reachable", "fail")]
    assert [check.name for check in checks if check.of == "t.0"] == IMAGE


@pytest.mark.parametrize("first", [0, 1, 2, 10])
def test_a_server_that_hangs_is_given_up_in_time(encoder, kinds, first):
    begin = time.monotonic()
    checks = prove(encoder, kinds, Liar(encoder, faults=lambda n: "hang" if n >= first else None), timeout=1)
    assert time.monotonic() - begin < 5
    assert [state for _, _, state in bad(checks)] == ["fail"]
    assert "no answer within 0.5 s" in checks[-1].found


@pytest.mark.parametrize(
    "fault", ["500", "close", "garbage", "truncated", "short", "wrong_ids", "other_request", "shifted", "nan", "floor"]
)
def test_a_server_that_gives_no_scores_fails_once(encoder, kinds, fault):
    scoring = lambda n: fault if n > 2 else None  # noqa: E731  # after the models and the vocabulary
    checks = prove(encoder, kinds, Liar(encoder, faults=scoring))
    assert bad(checks) == [("t.0", "scores", "fail")]
    assert [check.name for check in checks] == ["reachable", "vocabulary", "scores"]


def test_a_server_without_detokenize_is_a_warning(encoder, kinds):
    assert bad(prove(encoder, kinds, Liar(encoder, "no detokenize"))) == [("t.0", "vocabulary", "warn")]


@pytest.mark.parametrize("view", ["text", "blank"])
def test_a_teacher_that_is_shown_no_image_need_not_see_one(encoder, kinds, view):
    checks = prove(encoder, kinds, Blind(encoder, "blind"), view=view)
    assert bad(checks) == []
    assert [check.name for check in checks] == (TEXT if view == "text" else IMAGE[:-1])


def test_a_view_that_no_row_can_fill_is_a_failure(encoder, kinds):
    checks = prove(encoder, kinds, Liar(encoder), view="caption")
    assert bad(checks) == [("t", "view", "warn")]  # the text prompts have no image to caption
    only_images = [kind for kind in kinds if kind.modality == "image"]
    assert bad(prove(encoder, only_images, Liar(encoder), view="caption")) == [("t", "view", "fail")]


def test_a_teacher_without_prompts_is_asked_a_plain_question(encoder):
    checks = prove(encoder, [], Liar(encoder))
    assert [check.name for check in checks] == [name for name in TEXT if name not in {"control tokens", "context"}]
    assert bad(checks) == []


def test_a_teacher_without_an_endpoint_is_named(encoder, kinds):
    with pytest.raises(UserError, match="'t' has no endpoint"):
        asyncio.run(preflight(fleet(), {}, {}, encoder, kinds, max_tokens=1))


def test_the_whole_vocabulary_is_asked_in_chunks(encoder, kinds):
    server = Liar(encoder)
    prove(encoder, kinds, server)
    asked = [request["tokens"] for request in server.requests if "tokens" in request]
    assert [i for chunk in asked for i in chunk] == list(range(len(encoder.tokenizer)))
    assert max(map(len, asked)) <= CHUNK


def test_a_failure_prints_the_table_and_tells_every_way_out(encoder, kinds, tmp_path):
    checks = prove(encoder, kinds, Blind(encoder, "blind"), Liar(encoder, length=40))
    console = Console(width=110, record=True, file=io.StringIO())
    with pytest.raises(UserError) as error:
        insist(checks, console)
    table = console.export_text()
    assert "Preflight of the teachers" in table
    for of_, name, _ in bad(checks):
        assert f"- {of_}, {name}: " in str(error.value)
    assert str(error.value).count("→") == len(bad(checks)) == 2
    save(checks, tmp_path / "preflight.json")
    assert [c["state"] for c in json.loads((tmp_path / "preflight.json").read_text(encoding="utf-8"))] == [
        c.state for c in checks
    ]


def test_a_clean_table_is_not_printed_before_a_run(encoder, kinds):
    console = Console(record=True, file=io.StringIO())
    insist(prove(encoder, kinds, Liar(encoder)), console)
    assert not console.export_text()
