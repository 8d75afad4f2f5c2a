"""Bad data is never ignored silently: preparation leaves it out and counts it by cause, a draw replaces and counts it,
or it is refused by name.
"""

import io
import json
import random
import shutil
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mmopd import catalog, config
from mmopd.commands.train import say_left_out
from mmopd.config import Mixture
from mmopd.demo import world
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.prompts import PromptPlan, Rows, Shards, TokenCounter, index_tar, open_mixture, write_shards
from mmopd.prompts.prepare import Count, prepare
from mmopd.prompts.tokens import hash_processor
from mmopd.records import Encoded, Prompt
from mmopd.task.base import user_turn

GENERIC = Path(__file__).parents[1] / "data" / "generic.py"
NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    world.build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format=form, **options)
    return file.getvalue()


def noise(mode: str = "RGB") -> Image.Image:
    return Image.fromarray(NOISE).convert(mode)


def claiming(width: int, height: int) -> bytes:
    """Return a small PNG whose header claims a large size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    whole = saved(noise())
    return whole[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[33:]


def frames(form: str) -> bytes:
    return saved(noise(), form, save_all=True, append_images=[noise().rotate(90 * i) for i in (1, 2)])


GOOD = {
    "png": saved(noise()),
    "jpeg": saved(noise(), "JPEG"),
    "cmyk": saved(noise("CMYK"), "JPEG"),
    "palette": saved(noise("P")),
    "transparent": saved(noise("RGBA")),
    "grey": saved(noise("L")),
    "grey with alpha": saved(noise("LA")),
    "bits": saved(noise("1")),
    "webp": saved(noise(), "WEBP"),
    "one gif": saved(noise(), "GIF"),
    "one pixel": saved(Image.new("RGB", (1, 1))),
    "sideways": saved(noise(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
}
BAD = {
    "16 bits": saved(Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60))),
    "floats": saved(Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"),
    "animated gif": frames("GIF"),
    "animated webp": frames("WEBP"),
    "pages": frames("TIFF"),
    "bomb": claiming(30_000, 30_000),
    "30,000 pixels": claiming(30_000, 20),
    "many pixels": claiming(19_000, 19_000),
    "too thin": saved(Image.new("RGB", (1, 201))),
    "half a png": GOOD["png"][: len(GOOD["png"]) // 2],
    "half a jpeg": GOOD["jpeg"][: len(GOOD["jpeg"]) // 2],
    "a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "text": b"no image",
    "nothing": b"",
}


def made(
    rows: list[dict[str, Any]], *settings: str, processor: Path | None = None, max_bad: float = 1.0
) -> tuple[Shards, Count]:
    """Convert rows with `mmopd prepare`; images are written as files."""
    for i, row in enumerate(rows):
        if isinstance(row.get("image"), bytes):
            Path(f"{i}.bin").write_bytes(row["image"])
            row["image"] = f"{i}.bin"
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return prepare(
        GENERIC, Path("out"), ["data=rows.jsonl", *settings], processor=processor, max_bad=max_bad, max_rows=7
    )


IMAGES = ("task=digit_sum", "images=image")


def test_odd_images_are_kept_and_counted_as_they_are_seen(student: Path) -> None:
    shards, count = made(
        [{"question": name, "answer": "1", "image": data} for name, data in GOOD.items()], *IMAGES, processor=student
    )
    assert (count.rows, count.left_out) == (len(GOOD), {})
    encoder = Encoder(student)
    for i, name in enumerate(GOOD):
        encoded = encoder.encode(shards[i])
        assert len(encoded.expanded) == shards.tokens(i)
        pixels, grids = encoder.pixel_values(encoded)
        assert grids.tolist() == [list(grid) for grid in encoded.grids]
        assert len(pixels) == int(grids.prod())
        assert shards.image_sizes(i) == [{"one pixel": (1, 1), "sideways": (40, 60)}.get(name, (60, 40))]


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_left_out_with_its_reason(name: str) -> None:
    rows = [{"question": "?", "answer": "1", "image": data} for data in (GOOD["png"], BAD[name], GOOD["jpeg"])]
    shards, count = made(rows, *IMAGES)
    assert (len(shards), count.left_out) == (2, {"bad image": 1})
    assert count.shown["bad image"][0].startswith("example 1: image 0: ")


def test_text_that_cannot_be_used_is_left_out_with_its_reason() -> None:
    rows: list[dict[str, Any]] = [
        {"question": "1+1?", "answer": "2", "id": "a"},
        {"question": "1+1?", "id": "b"},
        {"question": "1+1?", "answer": None, "id": "c"},
        {"question": "1+1?", "answer": " ", "id": "d"},
        {"question": "\n", "answer": "2", "id": "e"},
        {"answer": "2", "id": "f"},
        {"question": "x" * 1_000_001, "answer": "2", "id": "g"},
        {"question": "1+1?", "answer": "2" * 16_000_001, "id": "h"},
        {"question": ["1+1?"], "answer": "2", "id": "i"},
        {"question": "1+1?", "answer": "2", "id": "a"},
        {"question": "1+1? <image>", "answer": "2", "id": "j"},
    ]
    shards, count = made(rows, "task=additions", "number=id")
    assert [row.answer for row in shards] == ["2", "2"]
    assert shards[1].messages[0]["content"] == [{"type": "text", "text": "1+1? <image>"}]
    assert count.left_out == {
        "no answer": 3,
        "no question": 3,
        "text too long": 1,
        "answer too long": 1,
        "duplicate key": 1,
    }


def test_a_text_over_the_students_limit_is_left_out_of_the_mixture(student: Path) -> None:
    shards, _ = made(
        [{"question": "1" * (1 + 9 * i), "answer": "2"} for i in range(20)], "task=additions", processor=student
    )
    limit = shards.tokens(9)
    source = {"shards": "out", "task": "additions", "max_prompt_tokens": limit}
    mixture = Mixture.model_validate({"sources": {"sums": source}})
    opened = open_mixture(mixture, ["additions"], Path.cwd(), hash_processor(student))["sums"]
    assert (len(opened), opened.left_out) == (10, {f"over {limit} tokens": 10})
    assert opened.kinds == {("additions", "text"): 10}
    say_left_out({"sums": opened}, Console(file=(out := io.StringIO()), width=200))
    assert out.getvalue() == "source sums: 10 rows are left out by max_prompt_tokens, 10 are used\n"
    with pytest.raises(
        UserError, match=r"sources\.sums\.max_prompt_tokens: its tokens were counted for another processor"
    ):
        open_mixture(mixture, ["additions"], Path.cwd(), "of another")
    index_tar(next(Path("out").glob("*.tar")))
    with pytest.raises(
        UserError, match=r"out: its tokens have not been counted; `mmopd index .*out --processor MODEL` counts them"
    ):
        open_mixture(mixture, ["additions"], Path.cwd())


def test_a_limit_that_no_row_meets_is_refused(student: Path) -> None:
    shards, _ = made([{"question": "1+1?", "answer": "2"}], "task=additions", processor=student)
    with pytest.raises(UserError, match="each of its 1 rows has more than 3 tokens"):
        shards.filtered(3)


def test_a_row_of_another_task_is_left_out(here: Path) -> None:
    code = GENERIC.read_text(encoding="utf-8").replace(
        "    return columns.ask(task,",
        "    from dataclasses import replace\n"
        "    return columns.ask(replace(task, name='sums') if answer == '3' else task,",
    )
    (here / "mixed.py").write_text(code, encoding="utf-8")
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"question": "?", "answer": str(i)}) + "\n" for i in range(5)), encoding="utf-8"
    )
    shards, count = prepare(here / "mixed.py", Path("out"), ["data=rows.jsonl", "task=additions"], max_bad=1)
    assert (len(shards), count.left_out) == (4, {"wrong task": 1})
    assert "a row of task 'sums' (text), but the source has task 'additions' (text)" in count.shown["wrong task"][0]


@pytest.mark.parametrize(("bad", "fails"), [(1, False), (2, True)])
def test_more_bad_rows_than_allowed_fail_and_a_higher_limit_goes_on(bad: int, fails: bool) -> None:
    rows = [{"question": "?", "answer": str(i)} for i in range(100 - bad)] + [{"question": "?"}] * bad
    if not fails:
        assert made(rows, "task=additions", max_bad=0.01)[1].rows == 99
        return
    with pytest.raises(
        UserError,
        match=r"out: 2 of 100 examples \(2\.0%\) are bad, more than --max-bad 1\.0%.*\n"
        r"  2 x no answer\n    example 98: ",
    ):
        made(rows, "task=additions", max_bad=0.01)
    assert not Path("out").exists()
    assert made(rows, "task=additions", max_bad=0.02)[1].rows == 98


def source_of(n: int) -> Shards:
    return write_shards(
        [Prompt(str(i), "additions", "text", tuple(user_turn(f"{i}+1?", 0)), (), str(i + 1)) for i in range(n)],
        Path("s"),
    )


def overwrite(tar: Path, old: bytes, new: bytes) -> None:
    content = tar.read_bytes()
    assert content.count(old) == 1
    assert len(old) == len(new)
    tar.chmod(0o644)
    tar.write_bytes(content.replace(old, new))


def test_rows_that_break_during_a_run_are_replaced_and_counted() -> None:
    shards = source_of(50)
    tar = next(Path("s").glob("*.tar"))
    overwrite(tar, b'"answer":"12"', b'"answer":1234')
    overwrite(tar, b'{"id":"20"', b'["id":"20"')
    plan = PromptPlan({"s": Rows(50, shards.fingerprint)}, {"s": 1}, 0)
    drawn = plan.read(48, lambda _, row: shards[row].answer)
    assert sorted(map(int, drawn)) == [i + 1 for i in range(50) if i not in (11, 20)]
    assert plan.replaced == {("s", "damaged"): 2}
    assert plan.epochs() == {"s": 1.0}


def test_a_tar_that_is_cut_during_a_run_ends_it_by_name() -> None:
    shards = source_of(300)
    tar = next(Path("s").glob("*.tar"))
    plan = PromptPlan({"s": Rows(300, shards.fingerprint)}, {"s": 1}, 0)
    plan.read(10, lambda _, row: shards[row])
    tar.chmod(0o644)
    tar.write_bytes(tar.read_bytes()[:5_000])
    with pytest.raises(
        UserError,
        match=r"source 's': 100 consecutive rows cannot be used; the last one: .*the file ends inside the row",
    ):
        plan.read(300, lambda _, row: shards[row])
    assert set(plan.replaced) == {("s", "truncated")}


def test_a_source_that_vanishes_during_a_run_ends_it_at_once() -> None:
    shards = source_of(300)
    plan = PromptPlan({"s": Rows(300, shards.fingerprint)}, {"s": 1}, 0)
    plan.read(10, lambda _, row: shards[row])
    shutil.rmtree("s")
    with pytest.raises(UserError, match=r"shard-00000-of-00001\.tar: the shard cannot be read any more \(No such file"):
        plan.read(1, lambda _, row: shards[row])


def test_a_source_without_rows_is_refused() -> None:
    Path("s").mkdir()
    with tarfile.open("s/a.tar", "w"):
        pass
    index_tar(Path("s/a.tar"))
    with pytest.raises(UserError, match="s: no rows, in 1 shards"):
        Shards(Path("s"))


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.99])
def test_a_tar_that_was_cut_gets_no_index(keep: float) -> None:
    source_of(20)
    tar = next(Path("s").glob("*.tar"))
    tar.chmod(0o644)
    content = tar.read_bytes().rstrip(b"\0")
    for length in (int(len(content) * keep), int(len(content) * keep) // 512 * 512):
        tar.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"shard-00000-of-00001\.tar: "):
            index_tar(tar)


def test_a_broken_header_is_not_the_end() -> None:
    source_of(20)
    tar = next(Path("s").glob("*.tar"))
    overwrite(tar, b"00000010.json", b"000000!0.json")
    with pytest.raises(UserError, match=r"shard-00000-of-00001\.tar: .*no header and no end at byte"):
        index_tar(tar)


def test_weights_that_sum_to_zero_are_refused() -> None:
    Path("data").mkdir()
    for text, message in (
        ("{a: {shards: s, task: t, weight: 0}}", "sources: the weights sum to zero"),
        ("{a: {shards: s, task: t, schedule: {5: 0, 9: 1}}}", "the weights sum to zero at step 5"),
    ):
        Path("data/mine.yaml").write_text(f"sources: {text}\n", encoding="utf-8")
        with pytest.raises(UserError, match=rf"data/mine\.yaml: .*{message}"):
            catalog.load_mixture("data/mine.yaml")


def fuzzed(rng: random.Random, i: int) -> dict[str, Any]:
    """Draw a row of any kind: a good row with up to three changes."""
    images = list(GOOD.values())
    row: dict[str, Any] = {"question": f"What is {i}?", "answer": str(i), "id": str(i), "image": rng.choice(images)}

    def flip() -> None:
        data = bytearray(row["image"] if isinstance(row.get("image"), bytes) and row["image"] else GOOD["png"])
        for _ in range(rng.choice([1, 10, 100])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        row["image"] = bytes(data)

    changes: list[Callable[[], object]] = [
        flip,
        lambda: row.update(image=rng.choice(list(BAD.values()))),
        lambda: row.update(
            image=(row.get("image") or b"x")[: rng.randrange(60)] if isinstance(row.get("image"), bytes) else "gone.png"
        ),
        lambda: row.update(image=rng.choice([None, "nowhere.png", 7, [], {"path": None}])),
        lambda: row.update(
            question=rng.choice(["", None, 5, "<image>?", "<image><image>", "\0\x1b ⁇ 🙂 ﷽" * 20, ["?"], {"a": 1}])
        ),
        lambda: row.update(answer=rng.choice(["", None, 5, "🙂", [], ["a", "b"], {"a": 1}, float("nan")])),
        lambda: row.update(id=rng.choice(["", None, "0", "1", str(i), 3.5, "x" * 300])),
        lambda: row.pop(rng.choice(list(row) or ["question"]), None),
    ]
    for change in rng.sample(changes, rng.choice([0, 0, 1, 1, 2, 3])):
        change()
    return row


@pytest.mark.parametrize("seed", range(3))
def test_200_fuzzed_rows_balance_in_prepare_and_in_the_plan(seed: int, student: Path) -> None:
    rng = random.Random(seed)
    shards, count = made([fuzzed(rng, i) for i in range(200)], *IMAGES, "number=id", processor=student)
    bad = sum(count.left_out.values())
    assert count.examples == 200 == count.rows + bad + count.not_wanted
    assert 40 < count.rows == len(shards) == shards.totals().rows
    assert bad > 40
    assert sum(min(3, n) for n in count.left_out.values()) == sum(map(len, count.shown.values()))

    encoder, counter = Encoder(student), TokenCounter(student)
    read: Counter[int] = Counter()

    def reader(source: str, row: int) -> Encoded:
        """Read a row as a run does; every seventh is broken."""
        if row % 7 == 0:
            raise ValueError("broken")
        read[row] += 1
        return encoder.encode(shards[row])

    plan = PromptPlan({"fuzz": Rows(len(shards), shards.fingerprint)}, {"fuzz": 1}, seed)
    good = [row for row in range(len(shards)) if row % 7]
    for epoch in (1, 2):
        encoded = plan.read(len(good), reader)
        assert Counter(good * epoch) == read
        assert {one.prompt.key for one in encoded} == {f"out/{row}" for row in good}
    assert len(good) * 2 + plan.replaced["fuzz", "unusable"] == round(plan.epochs()["fuzz"] * len(shards))
    for row in range(len(shards)):
        prompt = shards[row]
        assert shards.tokens(row) == sum(counter(prompt)) == len(encoder.encode(prompt).expanded)
        encoder.pixel_values(encoder.encode(prompt))  # every pixel can be decoded


def test_a_weight_goes_from_step_to_step_in_a_line() -> None:
    source = config.Source(shards="s", task="t", weight=1, schedule={10: 3, 20: 0})
    assert [source.weight_at(step) for step in (0, 5, 10, 15, 20, 99)] == [1, 2, 3, 1.5, 0, 0]
