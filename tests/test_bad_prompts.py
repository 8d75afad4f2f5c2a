"""A row that breaks one prompt is found when it is written, indexed or shown, and costs a run nothing else."""

import asyncio
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_vllm import FakeVLLM
from PIL import Image
from typer.testing import CliRunner

from mmopd.cli import app
from mmopd.config import Mixture, Recipe
from mmopd.demo import world
from mmopd.errors import DataError, ServerError
from mmopd.modality import Encoder
from mmopd.modality.registry import check_items
from mmopd.passes.each_row import each_row
from mmopd.preflight.questions import Kind, look
from mmopd.preflight.run import answers
from mmopd.prompts import Shards, index_tar, write_shards
from mmopd.records import Prompt, Score
from mmopd.rollout.collect import version_of
from mmopd.rollout.student_client import EngineError, PromptRefusedError, StudentClient
from mmopd.runtime.run_folder import RunFolder
from mmopd.serving import endpoint
from mmopd.task.base import user_turn
from mmopd.train import distributed
from mmopd.train.loop import open_rollouts
from mmopd.train.stream import Stream
from mmopd.train.weight_probe import probe, probe_items, to_probe
from mmopd.train.weight_publisher import WeightPublisher


@pytest.fixture(scope="module")
def enc(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("processor")
    world.build_processor().save_pretrained(folder)
    return Encoder(folder)


def photo(form: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


WHOLE = photo()
HALF = WHOLE[: len(WHOLE) // 2] + bytes(len(WHOLE) - len(WHOLE) // 2)  # of the same length


def shown(key: str, image: bytes) -> Prompt:
    return Prompt(key, "digit_sum", "image", tuple(user_turn("Their sum?", 1)), (image,), "1")


def damaged(folder: Path, rows: int = 4, bad: int = 2) -> Path:
    """Write a source, damage the image of one row, and return the tar."""
    write_shards([shown(str(i), WHOLE) for i in range(rows)], folder)
    (tar,) = folder.glob("*.tar")
    content = bytearray(tar.read_bytes())
    at = -1
    for _ in range(bad + 1):
        at = content.index(WHOLE, at + 1)
    content[at : at + len(HALF)] = HALF
    tar.write_bytes(content)
    return tar


def test_half_an_image_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1 \(b\): image 0: its pixels cannot be read"):
        write_shards([shown("a", WHOLE), shown("b", HALF)], tmp_path / "s")


def test_half_an_image_is_found_by_an_index_that_decodes(tmp_path: Path) -> None:
    tar = damaged(tmp_path / "s")
    index_tar(tar)
    assert len(Shards(tmp_path / "s")) == 4
    with pytest.raises(DataError, match=r"row '00000002': .*its pixels cannot be read"):
        CliRunner().invoke(app, ["index", str(tmp_path / "s"), "--decode"], catch_exceptions=False)


def test_half_an_image_is_named_when_a_prompt_is_about_to_be_asked() -> None:
    check_items(shown("s/0", WHOLE))
    with pytest.raises(ValueError, match=r"s/1: image: its pixels cannot be read"):
        check_items(shown("s/1", HALF))


STUDENT, TEACHER = 700, 400  # tokens of their contexts
LENGTHS = {"for the teacher": 500, "for the engine": 800}  # sevens of a question that is too long


def asked(key: str, text: str = "1+1=") -> Prompt:
    return Prompt(key, "additions", "text", ({"role": "user", "content": text},), (), "2")


class Healthy(WeightPublisher):
    """Publishes weights to an engine that has them and is never lost."""

    def __init__(self) -> None:
        pass

    async def wait_for_engine(self, version: str, error: Exception | None) -> None:
        raise error or AssertionError("no engine was lost")


async def roll(folder: Path, encoder: Encoder, rows: dict[str, list[Prompt]], n: int, steps: int) -> tuple[Any, ...]:
    """Roll out steps of n prompts; return the results of each, the stream, and the servers of student and teacher."""
    folder.mkdir(exist_ok=True)
    (folder / "fleet.yaml").write_text(
        "teachers: {t: {endpoints: ['http://t']}}\nroutes: [{teacher: t}]\n", encoding="utf-8"
    )
    mixture = Mixture.model_validate(
        {"sources": {name: {"shards": name, "task": some[0].task} for name, some in rows.items()}}
    )
    for name, some in rows.items():
        if not (folder / name).exists():
            write_shards(some, folder / name)
    rollout = {"prompts": n, "group": 2, "max_tokens": 8}
    recipe = Recipe.model_validate(
        {"student": {"model": "m"}, "mixture": "m", "fleet": folder / "fleet.yaml", "rollout": rollout}
    )
    sources = {name: Shards(folder / name) for name in rows}
    stream = Stream(mixture, sources, encoder, prompts=n, seed=0, measured=None)
    run, ranks = RunFolder(folder / "run"), distributed.start(60)
    run.root.mkdir()
    try:
        async with FakeVLLM(encoder, limit=STUDENT) as student, FakeVLLM(encoder, limit=TEACHER) as teacher:
            ends = [replace(student.endpoint, name="student", role="student"), replace(teacher.endpoint, name="t.0")]
            endpoint.save(run.endpoints, ends)
            async with open_rollouts(run, recipe, sources, encoder, ranks) as rollouts:
                rolled = []
                for step in range(steps):
                    student.version = version_of(step)
                    rolling = rollouts.begin(step, stream.draw(step))
                    rolled.append(await rollouts.finish(rolling, Healthy(), stream.replace))
                return rolled, stream, student, teacher
    finally:
        distributed.stop()


def replaced(stream: Stream) -> dict[str, Counter[str]]:
    return {name: Counter(source["replaced"]) for name, source in stream.state()["plan"]["sources"].items()}


def run_rolled(*args: Any) -> tuple[Any, ...]:
    return asyncio.run(asyncio.wait_for(roll(*args), 120))


def test_a_prompt_that_breaks_anywhere_is_replaced_from_its_source_and_counted(tmp_path: Path, enc: Encoder) -> None:
    texts = [asked(str(i)) for i in range(6)]
    texts[1] = asked("1", "7" * LENGTHS["for the engine"])
    texts[4] = asked("4", "7" * LENGTHS["for the teacher"])
    index_tar(damaged(tmp_path / "pictures", rows=5))
    rows = {"sums": texts, "pictures": [shown(str(i), WHOLE) for i in range(5)]}
    rolled, stream, *_ = run_rolled(tmp_path, enc, rows, 4, 4)
    assert {name: set(causes) for name, causes in replaced(stream).items()} == {
        "pictures": {"undecodable"},
        "sums": {"refused by the engine", "refused by t"},
    }
    for step in rolled:
        assert [prompt.prompt.key.partition("/")[0] for prompt in step.prompts].count("sums") == 2
        assert [sample.group for sample in step.samples] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert all(isinstance(sample.score, Score) for sample in step.samples)
        assert {"sums/1", "sums/4", "pictures/2"}.isdisjoint(prompt.prompt.key for prompt in step.prompts)


def test_a_prompt_that_breaks_uses_up_its_place_in_the_epoch(tmp_path: Path, enc: Encoder) -> None:
    texts = [asked(str(i), "7" * LENGTHS["for the engine"] if i in {1, 4} else "1+1=") for i in range(9)]
    rolled, stream, *_ = run_rolled(tmp_path, enc, {"sums": texts}, 2, 3)
    drawn = [one.prompt.key for step in rolled for one in step.prompts]
    assert len(set(drawn) - {"sums/1", "sums/4"}) == 6
    assert stream.state()["plan"]["sources"]["sums"]["position"] == 6 + replaced(stream)["sums"].total()


def test_one_refused_prompt_is_not_a_dead_engine_and_a_second_one_is(tmp_path: Path, enc: Encoder) -> None:
    long = [asked(str(i), "7" * LENGTHS["for the engine"]) for i in range(8)]
    with pytest.raises(EngineError, match=r"could not sample prompt sums/\d: status: .*longer than the maximum model"):
        run_rolled(tmp_path, enc, {"sums": long}, 1, 1)
    good_after = [long[0], asked("1")]
    rolled, *_ = run_rolled(tmp_path / "two", enc, {"sums": good_after}, 1, 2)
    assert {step.prompts[0].prompt.key for step in rolled} == {"sums/1"}


def test_a_teacher_that_refuses_every_prompt_ends_the_run(tmp_path: Path, enc: Encoder) -> None:
    long = [asked(str(i), "7" * LENGTHS["for the teacher"]) for i in range(8)]
    with pytest.raises(ServerError, match=r"teacher t refuses prompt sums/\d: status: .*longer than the maximum"):
        run_rolled(tmp_path, enc, {"sums": long}, 2, 1)


def test_a_source_of_which_every_row_breaks_ends_the_run_by_name(tmp_path: Path, enc: Encoder) -> None:
    rows = {"good": [asked(str(i)) for i in range(9)]}
    rows["bad"] = [asked(str(i), "7" * LENGTHS["for the engine"]) for i in range(5)]
    with pytest.raises(
        DataError, match=r"source 'bad': 5 consecutive rows cannot be used; the last one: the student's"
    ):
        run_rolled(tmp_path, enc, rows, 4, 3)


def test_the_probe_takes_the_first_row_that_can_be_used(tmp_path: Path, enc: Encoder) -> None:
    index_tar(damaged(tmp_path / "s", bad=0))
    assert [item.encoded.prompt.key for item in probe_items([Shards(tmp_path / "s")], enc)] == ["s/1"]


def test_a_prompt_that_the_engine_refuses_ends_neither_the_probe_nor_the_preflight(enc: Encoder) -> None:
    good, long = asked("s/0"), asked("s/1", "7" * LENGTHS["for the engine"])

    async def ask(prompts: list[Prompt]) -> tuple[float, dict[str, int]]:
        items = [to_probe(prompt, enc) for prompt in prompts]
        async with FakeVLLM(enc, limit=STUDENT) as student:
            async with StudentClient(student.endpoint, enc, timeout=20) as engine:
                ours = [torch.tensor(await engine.logprobs(to_probe(good, enc).encoded, one.tokens)) for one in items]
                gap = await probe(ours, [engine], items, 1e-4)
            responses = await answers(student.endpoint, enc, [Kind("", "text", shown=prompts)], max_tokens=8)
        return gap, {key: len(some) for key, some in responses.items()}

    assert asyncio.run(ask([good, long])) == (0.0, {"s/0": 2, "s/1": 0})
    with pytest.raises(PromptRefusedError):
        asyncio.run(ask([long]))


def test_the_preflight_asks_for_no_answer_to_a_prompt_that_cannot_be_encoded(enc: Encoder) -> None:
    async def ask(prompts: list[Prompt]) -> dict[str, list[tuple[int, ...]]]:
        async with FakeVLLM(enc) as student:
            return await answers(student.endpoint, enc, [Kind("", "image", shown=prompts)], max_tokens=8)

    broken = replace(shown("s/1", b"no image"), images=(b"no image",))
    assert {key: len(some) for key, some in asyncio.run(ask([asked("s/0"), broken])).items()} == {"s/0": 2, "s/1": 0}


def test_the_preflight_shows_no_row_that_breaks(tmp_path: Path, enc: Encoder) -> None:
    index_tar(damaged(tmp_path / "s", bad=0))
    (kind,) = look({"s": Shards(tmp_path / "s")}, enc)
    assert (kind.unreadable, [prompt.key for prompt in kind.shown]) == (1, ["s/1", "s/2", "s/3"])


def passed(refused: set[int], rows: int = 5, found: Sequence[int] = ()) -> tuple[dict[int, Any], int]:
    """Run a pass in which the engine refuses some rows."""

    async def find(encoded: Any) -> tuple[str]:
        if encoded in refused:
            raise PromptRefusedError(f"it refuses {encoded}")
        return ("found",)

    ledger = Found(dict.fromkeys(found, ("found",)))
    fake = SimpleNamespace(encode=lambda row: row, note=lambda text: None, advance=lambda: None)
    passing = each_row({"s": range(rows)}, {"s": ledger}, fake, find, ("nothing",), at_once=2, stage=fake)  # type: ignore
    return ledger, asyncio.run(passing)


class Found(dict[int, tuple[Any, ...]]):
    def add(self, row: int, *found: Any) -> None:
        self[row] = found


def test_a_pass_stores_nothing_for_a_row_that_the_engine_refuses() -> None:
    ledger, unreadable = passed({0, 3})
    assert unreadable == 2
    assert ledger == {row: ("nothing",) if row in {0, 3} else ("found",) for row in range(5)}
    assert passed({2}, rows=3, found=[0, 1])[1] == 1


def test_a_pass_in_which_the_engine_refuses_all_rows_fails_and_finds_nothing() -> None:
    with pytest.raises(PromptRefusedError, match="it refuses 0"):
        passed(set(range(5)))
    with pytest.raises(PromptRefusedError, match="it refuses"):
        passed(set(range(3, 300)), rows=300)
