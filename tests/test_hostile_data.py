"""Data that nobody has checked: `mmopd prepare` leaves out what cannot be an example, and never waits for it."""

import base64
import codecs
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_bad_prompts import WHOLE

from mmopd.errors import DataError
from mmopd.prompts.convert import SourceSettings, images, read
from mmopd.prompts.prepare import Count, prepare
from mmopd.prompts.rows import RowError
from mmopd.prompts.shards import Shards

GENERIC = Path(__file__).parents[1] / "data" / "generic.py"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/good.png").write_bytes(WHOLE)
    Path("outside.png").write_bytes(WHOLE)
    return tmp_path


def taken(value: object, root: str | None = None) -> bytes:
    (file,) = images({"image": value}, "image", SourceSettings(data="data", task="t", root=root and Path(root)))
    return file


def pipe() -> str:
    os.mkfifo("data/pipe.png")
    return "pipe.png"


def leading(to: str) -> Callable[[], str]:
    def make() -> str:
        Path("data/link.png").symlink_to(to)
        return "link.png"

    return make


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (pipe, "no image file"),
        (leading("/dev/urandom"), "outside of the data"),
        (leading("/dev/zero"), "outside of the data"),
        (leading("../outside.png"), "outside of the data"),
        (lambda: "/dev/zero", "outside of the data"),
        (lambda: "../outside.png", "outside of the data"),
        (lambda: str(Path("outside.png").resolve()), "outside of the data"),
        (lambda: ".", "no image file"),
        (lambda: "nowhere.png", "no image file"),
        (lambda: "data:image/png,abc", "bad image"),
        (lambda: "data:image/png;base64,%%%", "bad image"),
    ],
)
def test_a_path_that_is_no_image_file_of_the_data_is_a_bad_row(make: Callable[[], str], cause: str) -> None:
    found: list[BaseException] = []

    def take() -> None:
        try:
            taken(make())
        except RowError as error:
            found.append(error)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it waits for a pipe or a device"
    assert [getattr(error, "cause", None) for error in found] == [cause]


def test_a_device_is_no_file_even_within_its_root() -> None:
    with pytest.raises(RowError, match="/dev/zero: not a file"):
        taken("dev/zero", root="/")


def test_an_image_may_be_in_the_folder_or_in_the_root_that_is_set_or_a_data_url() -> None:
    assert taken("good.png") == taken("x/../good.png") == WHOLE
    assert taken("outside.png", root=".") == WHOLE
    assert taken("data:image/png;base64," + base64.b64encode(WHOLE).decode()) == WHOLE


def test_base64_is_not_printed_whole() -> None:
    with pytest.raises(RowError) as error:
        taken(base64.b64encode(os.urandom(30_000)).decode())
    assert len(str(error.value)) < 300
    assert "40,000 characters, and no data URL" in str(error.value)


def made(*settings: str) -> tuple[Shards, Count]:
    shutil.rmtree("out", ignore_errors=True)
    return prepare(GENERIC, Path("out"), settings, max_bad=1.0)


def test_a_column_with_a_dot_in_its_name_is_read() -> None:
    table = pa.table({"a.b": ["1+1?"], "c": [{"d": "2"}], "rest": ["x"]})
    pq.write_table(table, "t.parquet")
    shards, _ = made("data=t.parquet", "task=additions", "question=a.b", "answer=c.d")
    assert (shards[0].messages[0]["content"][0]["text"], shards[0].answer) == ("1+1?", "2")


def test_a_missing_column_is_answered_with_all_columns() -> None:
    pq.write_table(pa.table({"query": ["1+1?"], "answer": ["2"], "rest": ["x"]}), "t.parquet")
    with pytest.raises(DataError, match=r"the column 'question' is missing or empty; there is query, answer, rest"):
        made("data=t.parquet", "task=additions")


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.jsonl"])
def test_lines_are_read_with_any_case_and_with_a_byte_order_mark(name: str) -> None:
    Path(name).write_bytes(
        codecs.BOM_UTF8 + b'{"question": "1+1?", "answer": "2"}\r\n{"question": "1+2?", "answer": "3"}\r\n'
    )
    assert [row.answer for row in made(f"data={name}", "task=additions")[0]] == ["2", "3"]


def test_a_folder_with_metadata_csv_is_a_table(here: Path) -> None:
    Path("data/metadata.csv").write_text("\ufefffile_name,text,label\ngood.png,Their sum?,007\n", encoding="utf-8")
    Path("data/._metadata.csv").write_bytes(b"Mac OS X")
    Path("data/other.csv").write_text("x\n1\n", encoding="utf-8")
    settings = ["task=digit_sum", "images=file_name", "question=text", "answer=label"]
    shards, count = made("data=data", *settings)
    assert (count.examples, shards[0].answer, shards[0].images) == (1, "007", (WHOLE,))


def test_a_csv_may_hold_images_as_data_urls() -> None:
    url = "data:image/png;base64," + base64.b64encode(WHOLE).decode()
    padded = "data:image/png;base64," + base64.b64encode(WHOLE + bytes(200_000)).decode()
    Path("t.csv").write_text(f'question,answer,image\n?,1,"{url}"\n?,2,"{padded}"\n', encoding="utf-8")
    shards, _ = made("data=t.csv", "task=digit_sum", "images=image")
    assert [row.images for row in shards] == [(WHOLE,), (WHOLE + bytes(200_000),)]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"data": ' + '[{"a":' * 50_000])
def test_deep_json_is_refused_by_name(text: str) -> None:
    Path("deep.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"deep\.json: not valid JSON"):
        read(SourceSettings(data="deep.json", task="t"))
    Path("deep.jsonl").write_text(text + '\n{"question": "1+1?", "answer": "2"}\n', encoding="utf-8")
    assert made("data=deep.jsonl", "task=additions")[1].left_out.total() == 1


def test_a_row_without_images_in_a_table_of_both_kinds_is_not_wanted() -> None:
    rows = [{"question": "?", "answer": "1", "image": value} for value in ("data/good.png", None, [], "", "gone.png")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    _, count = made("data=rows.jsonl", "task=digit_sum", "images=image")
    assert (count.rows, count.not_wanted, count.left_out) == (1, 3, {"no image file": 1})
