import asyncio
import base64
import copy
import dataclasses
import io
import json
import random
import time
from contextlib import AsyncExitStack

import pytest
from fake_vllm import FakeVLLM
from PIL import Image
from rich.console import Console

from mmopd.config import Engine, Fleet, Route, Teacher
from mmopd.demo.world import additions, build_processor, build_student, digit_sums
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.modality.pixels import open_image
from mmopd.modality.registry import MEDIA
from mmopd.preflight.examination import CHUNK
from mmopd.preflight.questions import LONGEST, in_float32, look
from mmopd.preflight.run import answers, insist, preflight, save, summary
from mmopd.prompts import Shards, TokenCounter, write_shards
from mmopd.records import Prompt
from mmopd.runtime.processes import Children
from mmopd.serving.servers import serve
from mmopd.serving.specs import ServerSpec

MAX_TOKENS = 24
TEXT = ["reachable", "vocabulary", "scores", "context", "top-k", "same score twice"]
IMAGE = ["reachable", "vocabulary", "scores", "image tokens", "context", "top-k", "same score twice", "image canary"]


class Liar(FakeVLLM):
    """A fake server that is good except for one thing, its `lie`; it claims to take `length` tokens."""

    def __init__(self, encoder, lie="", *, length=2048, top_k=20, **settings):
        super().__init__(encoder, **settings)
        self.lie, self.length, self.top_k = lie, length, top_k

    def _reply(self, line, headers, request, fault):
        verb, path, _ = line.split()
        if headers.get("authorization") != f"Bearer {self.key}":
            return 401, b""
        if (verb, path) == ("GET", "/v1/models"):
            return 200, json.dumps({"object": "list", "data": [{"id": "tiny", "max_model_len": self.length}]}).encode()
        if (verb, path) == ("POST", "/detokenize"):
            return self._detokenize(request["tokens"])
        settings = request["sampling_params"]
        if settings.get("prompt_logprobs", 0) > self.top_k:
            return 400, b'{"error":{"message":"Requested prompt logprobs of 20, which is greater than max allowed: 5"}}'
        if self.lie == "500 with images" and "content_parts" in request:
            return 500, b'{"error":{"message":"EngineCore encountered an issue"}}'
        status, body = super()._reply(line, headers, request, fault)
        if status != 200 or fault == "garbage":
            return status, body
        reply = json.loads(body)
        if len(reply["prompt_token_ids"]) + settings["max_tokens"] > self.length:
            return 400, b'{"error":{"message":"the maximum model length"}}'
        return status, json.dumps(self._twist(reply)).encode()

    def _detokenize(self, tokens):
        if self.lie == "no detokenize":
            return 404, b'{"detail":"Not Found"}'
        swap = {700: 701, 701: 700} if self.lie == "two ids swapped" else {}
        shift = 3 if self.lie == "shifted vocabulary" else 0
        text = self.encoder.tokenizer.decode([swap.get(t, t + shift if t >= 300 else t) for t in tokens])
        return 200, json.dumps({"prompt": text}).encode()

    def _twist(self, reply):
        ids, rows = reply["prompt_token_ids"], reply["prompt_logprobs"]
        pad = self.encoder.image_token
        if self.lie == "double expansion" and pad in ids:
            extra, at = ids.count(pad) - 1, ids.index(pad)
            ids[at:at], rows[at:at] = [pad] * extra, [rows[at]] * extra
        for i, row in enumerate(rows):
            for entry in row.values() if row else ():
                if self.lie == "noise":
                    entry["logprob"] -= random.random()
                if self.lie == "other weights":
                    entry["logprob"] -= i % 3 / 4
        return reply


class Blind(Liar):
    """A server that expands the images and then ignores them, or ignores the positions in them."""

    def _twist(self, reply):
        return reply

    def _reply(self, line, headers, request, fault):
        if "content_parts" in request:
            parts = [dict(part) for part in request["content_parts"]]
            for part in parts:
                part["url"] = self._seen(part["url"])
            request = request | {"content_parts": parts}
        return super()._reply(line, headers, request, fault)

    def _seen(self, url):
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
        colours = (
            sorted(image.get_flattened_data())
            if self.lie == "bag of pixels"
            else [(0, 0, 0)] * (image.width * image.height)
        )
        flat = Image.new("RGB", image.size)
        flat.putdata(colours)
        file = io.BytesIO()
        flat.save(file, "PNG")
        return "data:image/*;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    return Encoder(folder)


def prompt(row, modality, key):
    return Prompt(key, f"{modality}_task", modality, tuple(row["messages"]), tuple(row["images"]), row["answer"])


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


def bad(checks):
    return [(check.of, check.name, check.state) for check in checks if check.state != "ok"]


def of(checks, name):
    return next(check for check in checks if check.name == name)


def test_an_honest_teacher_passes_everything(encoder, kinds):
    checks = prove(encoder, kinds, Liar(encoder), Liar(encoder))
    assert bad(checks) == []
    assert [check.name for check in checks] == [*IMAGE, *IMAGE, "same on replicas"]
    assert summary(checks, {"t": [None, None]}) == "1 teacher, 2 replicas: 17 checks passed"


@pytest.mark.parametrize(
    ("server", "lie", "name", "says"),
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
def test_each_lie_is_caught_by_its_own_check_and_by_no_other(encoder, kinds, server, lie, name, says):  # noqa: PLR0917
    checks = prove(encoder, kinds, server(encoder, lie))
    assert bad(checks) == [("t.0", name, "fail")]
    assert says in of(checks, name).found
    assert of(checks, name).way_out


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
    assert [check.name for check in checks] == [name for name in TEXT if name != "context"]
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


def test_the_longest_prompt_is_found_among_many(encoder, sources):
    long = dataclasses.replace(sources["sums"][0], messages=({"role": "user", "content": "one two three " * 40},))
    rows = sources["sums"] * 40
    rows[333] = long
    (kind,) = look({"sums": rows}, encoder)
    assert kind.rows == 480
    assert kind.longest[0] is long
    assert len(kind.longest) == LONGEST
    assert len(kind.shown) == 4


def test_where_tokens_are_counted_only_the_longest_rows_are_read(encoder, sources, tmp_path):
    long = dataclasses.replace(sources["sums"][0], messages=({"role": "user", "content": "one two three " * 40},))
    rows = sources["sums"] * 40
    rows[333] = long
    encoder.processor.save_pretrained(tmp_path / "model")
    shards = write_shards(rows, tmp_path / "sums", counter=TokenCounter(tmp_path / "model"))
    read = []

    class Counting(Shards):
        def __getitem__(self, row):
            read.append(row)
            return super().__getitem__(row)

    (kind,) = look({"sums": Counting(shards.folder)}, encoder)
    assert kind.rows == 480
    assert kind.longest[0].messages == long.messages
    assert len(read) <= 8


def test_rows_that_cannot_be_read_are_counted_and_a_source_of_nothing_else_is_an_error(encoder, sources):
    broken = dataclasses.replace(sources["digits"][0], images=(b"no image", b"nor this"))
    (kind,) = look({"digits": [broken, *sources["digits"]]}, encoder)
    assert (kind.rows, kind.unreadable) == (12, 1)
    with pytest.raises(UserError, match=r"sources\.digits: none of the 3 rows"):
        look({"digits": [broken] * 3}, encoder)


def test_a_shuffled_image_has_the_same_pixels_in_other_places(sources):
    before = sources["digits"][0].images[0]
    (after,) = MEDIA["image"].shuffled((before,), 0)
    real, other = (open_image(image).convert("RGB") for image in (before, after))
    assert real.size == other.size
    assert sorted(real.get_flattened_data()) == sorted(other.get_flattened_data())
    assert real.tobytes() != other.tobytes()
    assert (after,) == MEDIA["image"].shuffled((before,), 0)


def test_only_what_is_known_to_be_float32_is_judged_as_such(tmp_path):
    (tmp_path / "config.json").write_text('{"dtype": "float32"}')

    def is_precise(**teacher):
        return in_float32(Fleet.model_validate({"teachers": {"t": teacher}, "routes": []}).teachers["t"])

    assert is_precise(model=tmp_path)
    assert is_precise(model=tmp_path, engine={"dtype": "float32"})
    assert not is_precise(model=tmp_path, engine={"dtype": "bfloat16"})
    assert not is_precise(model=tmp_path / "on another machine")
    assert not is_precise(endpoints=["http://t"])


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
    assert [c["state"] for c in json.loads((tmp_path / "preflight.json").read_text())] == [c.state for c in checks]


def test_a_clean_table_is_not_printed_before_a_run(encoder, kinds):
    console = Console(record=True, file=io.StringIO())
    insist(prove(encoder, kinds, Liar(encoder)), console)
    assert not console.export_text()


@pytest.fixture(scope="module")
def real(server, tmp_path_factory):
    """Start a real vLLM server with a random tiny Qwen3-VL. Returns (endpoint, folder, settings)."""
    folder = tmp_path_factory.mktemp("real")
    build_student(folder / "model")
    engine = Engine(dtype="float32", max_model_len=256, max_num_seqs=32, kv_cache_mib=64, enforce_eager=True)
    spec = ServerSpec("tiny", folder / "model", engine, updatable=False)
    with Children() as children, serve([spec], children, folder, lambda name, what: None) as servers:
        yield servers["tiny"], folder / "model", engine


def test_a_real_server_passes_everything_with_not_one_token_to_spare(real, sources):
    endpoint, folder, engine = real
    encoder = Encoder(folder)
    kinds = look(sources, encoder)
    served = Fleet(teachers={"t": Teacher(model=folder, engine=engine)}, routes=(Route(teacher="t"),))
    room = engine.max_model_len - 1 - max(len(encoder.encode(p).expanded) for kind in kinds for p in kind.longest)

    async def ask(max_tokens, top_k):
        responses = await answers(endpoint, encoder, kinds, max_tokens=MAX_TOKENS)
        replicas = {"t": [endpoint, endpoint]}
        return await preflight(
            served, {}, replicas, encoder, kinds, max_tokens=max_tokens, top_k=top_k, responses=responses
        )

    passed = asyncio.run(ask(room, 20))
    assert bad(passed) == []
    assert [check.name for check in passed] == [*IMAGE, *IMAGE, "same on replicas"]
    assert of(passed, "image canary").numbers["needed"] < 0.1  # the tolerance of float32 applies
    failed = asyncio.run(ask(room + 1, 21))  # vLLM returns at most 20 by default
    assert [name for _, name, _ in bad(failed)] == ["context", "top-k"] * 2
