"""Folders of images as people have them: classes, splits, a metadata file; nothing is read outside of them."""

import base64
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmopd.errors import DataError
from mmopd.prompts.prepare import Count, prepare
from mmopd.prompts.shards import Shards

GENERIC = Path(__file__).parents[1] / "data" / "generic.py"
ASKED = ("images=file_name", "answer=label", "ask=Which pet?", "task=pets")
CAPTIONED = ("images=file_name", "question=text", "answer=label", "task=pets")


def picture(shade: int = 0, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 0, 0)).save(file, form)
    return file.getvalue()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a workspace with a task that has no verifier."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "modalities").mkdir()
    (tmp_path / "modalities/pets.py").write_text(
        'from mmopd.task import Task\ntask = Task(name="pets", modality="image")\n', encoding="utf-8"
    )
    return tmp_path


def place(*names: str) -> None:
    for number, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(picture(number, "JPEG" if name.endswith("jpg") else "PNG"))


def made(*settings: str, data: str = "pets") -> tuple[Shards, Count]:
    return prepare(GENERIC, Path("out"), [f"data={data}", *settings], max_bad=1.0)


def labels(*settings: str) -> list[str]:
    return [row.answer for row in made(*ASKED, *settings)[0]]


def test_folders_are_classes() -> None:
    place("pets/cat/1.png", "pets/cat/2.JPEG", "pets/dog/1.jpg", "pets/train/1.png")
    assert labels() == ["cat", "cat", "dog", "train"]  # a class may have the name of a split


@pytest.mark.parametrize("names", [("train", "val", "test"), ("training", "validation", "testing"), ("train", "dev")])
def test_folders_of_splits_hold_classes(names: tuple[str, ...]) -> None:
    for name in names:
        place(f"pets/{name}/{name}_cat/1.png", f"pets/{name}/{name}_dog/1.png")
    assert labels() == [f"{names[0]}_cat", f"{names[0]}_dog"]
    Path("out").rename("train")
    assert labels("split=validation") == [f"{names[1]}_cat", f"{names[1]}_dog"]


def test_a_split_that_is_not_there_is_refused_and_not_replaced_by_another() -> None:
    place("pets/val/cat/1.png", "pets/test/dog/1.png")
    with pytest.raises(DataError, match="split: pets has no 'train'; its folders are test, val"):
        made(*ASKED)
    for name in ("validation-0.jsonl", "test.jsonl"):
        Path("pets", name).write_text("{}\n", encoding="utf-8")
    with pytest.raises(DataError, match="split: pets has no 'train'; its splits are: test, validation"):
        made(*ASKED)
    with pytest.raises(DataError, match="split: pets has no 'extra'; its splits are: test, validation"):
        made(*ASKED, "split=extra")


def test_tables_of_no_split_are_read_and_those_of_others_are_not() -> None:
    Path("pets").mkdir()
    for name in ("sums", "test"):
        Path("pets", f"{name}.jsonl").write_text(json.dumps({"question": name, "answer": "1"}), encoding="utf-8")
    shards, _ = made("task=additions")
    assert [row.messages[0]["content"][0]["text"] for row in shards] == ["sums"]


ROWS = [{"file_name": f"{name}.png", "text": f"Which is {name}?", "label": name} for name in ("cat", "dog")]


def write(kind: str, folder: str) -> None:
    path = Path(folder, f"metadata.{kind}")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    else:
        sign = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text("\n".join(sign.join(row) for row in [ROWS[0], *map(dict.values, ROWS)]), encoding="utf-8")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_metadata_file_names_images_from_its_own_folder(kind: str) -> None:
    for split in ("train", "val"):
        place(f"pets/{split}/cat.png", f"pets/{split}/dog.png")
        write(kind, f"pets/{split}")
    Path("pets/train/cat.png").write_bytes(picture(77))
    shards, count = made(*CAPTIONED)
    assert [row.answer for row in shards] == ["cat", "dog"]
    assert [row.images for row in shards] == [(picture(77),), (picture(1),)]
    assert (count.examples, shards[1].messages[0]["content"][1]["text"]) == (2, "Which is dog?")
    Path("out").rename("train")
    assert made(*CAPTIONED, "split=val")[0][0].images == (picture(0),)
    Path("out").rename("val")
    write(kind, "pets/val")
    assert made(*CAPTIONED, "root=pets/val", data=f"pets/val/metadata.{kind}")[1].rows == 2


def test_damaged_rows_of_a_metadata_file_are_counted_by_cause() -> None:
    place("pets/train/cat.png", "pets/dog.png", "outside.png")
    Path("pets/train/link.png").symlink_to("../../outside.png")
    Path("pets/train/loop.png").symlink_to("loop.png")
    Path("pets/train/half.png").write_bytes(picture()[:60])
    Path("pets/train/text.png").write_text("no image", encoding="utf-8")
    os.mkfifo("pets/train/pipe.png")
    names = ["cat.png", "../dog.png", "dog.png", "../../outside.png", "/etc/passwd", "link.png", "pipe.png", ".", ""]
    names += ["half.png", "text.png", "https://example.org/cat.png", "file:///etc/passwd", "a\0b.png", "s3://b/cat.png"]
    names += ["loop.png"]
    rows = [{"file_name": name, "text": "Which?", "label": "cat"} for name in names]
    lines = [*map(json.dumps, rows), "[1]", "{", '{"file_name": "cat.png", "text": "Which?"}']
    Path("pets/train/metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    shards, count = made(*CAPTIONED)
    assert (len(shards), count.not_wanted) == (2, 1)
    assert count.left_out == {
        "outside of the data": 4,
        "no image file": 5,
        "bad image": 2,
        "image by URL": 2,
        "no object": 1,
        "not JSON": 1,
        "no label": 1,
    }
    assert "images are not fetched; download them" in count.shown["image by URL"][0]


def test_damaged_images_of_a_folder_are_counted() -> None:
    place("pets/cat/1.png", "outside.png")
    Path("pets/cat/2.png").write_bytes(picture()[:60])
    Path("pets/cat/3.png").touch()
    Path("pets/cat/4.png").symlink_to("/dev/zero")
    Path("pets/cat/5.png").symlink_to("../../outside.png")
    Path("pets/cat/._1.png").write_bytes(b"Mac OS X")
    Path("pets/cat/notes.txt").touch()
    shards, count = made(*ASKED)
    assert (len(shards), count.left_out) == (1, {"bad image": 2, "outside of the data": 2})


def test_a_table_that_leads_out_of_the_folder_is_refused() -> None:
    Path("pets").mkdir()
    Path("secret.jsonl").write_text('{"question": "1+1=", "answer": "2"}\n', encoding="utf-8")
    Path("pets/rows.jsonl").symlink_to("../secret.jsonl")
    with pytest.raises(DataError, match=r"pets/rows\.jsonl: leads out of pets; set `root` to a folder above both"):
        made("task=additions")
    assert made("task=additions", "root=.")[1].rows == 1


def test_an_image_may_be_base64_as_in_tables_of_benchmarks() -> None:
    whole = base64.b64encode(picture(5, "JPEG")).decode()
    cut = base64.b64encode(b"\x89PNG" + bytes(60)).decode()
    other = base64.b64encode(bytes(100)).decode()
    values = [whole, "\n".join(whole[i : i + 76] for i in range(0, len(whole), 76)), cut, other, whole[:-3] + "!!!"]
    lines = [f'{i}\t"{value}"\tWhich?\tA' for i, value in enumerate(values)]
    Path("bench.tsv").write_text("\n".join(["index\timage\ttext\tlabel", *lines]), encoding="utf-8")
    shards, count = made("images=image", "question=text", "answer=label", "task=pets", data="bench.tsv")
    assert [row.images for row in shards] == [(picture(5, "JPEG"),)] * 2
    assert count.left_out == {"bad image": 1, "no image file": 1, "outside of the data": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data=pets"], "data: pets: it has neither .* nor images"),
        (["data=mine.jsonl"], r"data: mine\.jsonl: no such file or folder"),
        (["data=./mine"], r"data: \./mine: no such file or folder"),
        (["data=https://example.org/a.jsonl"], "data: https://example.org/a.jsonl: no such file or folder"),
        (["data=https://example.org/a"], "data: https://example.org/a: no such file or folder"),
        (["data=pets", "root=nowhere"], "root: nowhere: no such folder"),
        (["data=pipe.jsonl"], "data: pipe.jsonl: cannot be read; known files are"),
    ],
)
def test_what_is_not_there_is_named_by_its_key_and_never_looked_for_on_the_network(
    settings: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("it asks the hub"))
    Path("pets").mkdir()
    os.mkfifo("pipe.jsonl")
    with pytest.raises(DataError, match=message):
        prepare(GENERIC, Path("out"), [*ASKED, *settings])
