"""Questions of the preflight about the prompts of a run, and a real server that passes it."""

import asyncio
import dataclasses

import pytest
from fake_teachers import IMAGE, bad, of
from scoring import processor_encoder, prompt

from mmopd.config import Engine, Fleet, Route, Teacher
from mmopd.demo.world import additions, build_student, digit_sums
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.modality.pixels import open_image
from mmopd.modality.registry import MEDIA
from mmopd.preflight.questions import LONGEST, in_float32, look
from mmopd.preflight.run import answers, preflight
from mmopd.prompts import Shards, TokenCounter, write_shards
from mmopd.runtime.processes import Children
from mmopd.serving.servers import serve
from mmopd.serving.specs import ServerSpec

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
    (tmp_path / "config.json").write_text('{"dtype": "float32"}', encoding="utf-8")

    def is_precise(**teacher):
        return in_float32(Fleet.model_validate({"teachers": {"t": teacher}, "routes": []}).teachers["t"])

    assert is_precise(model=tmp_path)
    assert is_precise(model=tmp_path, engine={"dtype": "float32"})
    assert not is_precise(model=tmp_path, engine={"dtype": "bfloat16"})
    assert not is_precise(model=tmp_path / "on another machine")
    assert not is_precise(endpoints=["http://t"])


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
