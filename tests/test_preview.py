"""The first rows of `mmopd prepare`: in the terminal, and as a page that escapes what it shows and loads nothing."""

import io
import json
import random
import re
from pathlib import Path

import pytest
from clips import CONVERTER
from PIL import Image
from typer.testing import CliRunner

from mmopd.cli import app
from mmopd.errors import DataError, UserError
from mmopd.prompts.prepare import first_rows
from mmopd.report import preview
from mmopd.report.inspection.page import ITEMS

GENERIC = Path(__file__).parents[1] / "data" / "generic.py"
ODD = "<script>alert(1)</script> [bold]\x1b[31m\u202e1+1=?"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photo(name: str, side: int = 900) -> str:
    Image.frombytes("RGB", (side, side), random.Random(0).randbytes(3 * side * side)).save(name)
    return name


def write(rows: list[object]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(*options: str, task: str = "digit_sum", images: str | None = "image") -> str:
    settings = ["data=rows.jsonl", f"task={task}", *([f"images={images}"] if images else [])]
    arguments = ["prepare", "data/generic.py", "out", "--workers", "1", *options]
    return (
        CliRunner()
        .invoke(app, [*arguments, *(part for one in settings for part in ("--set", one))], catch_exceptions=False)
        .output
    )


def test_three_rows_are_shown_before_they_are_written() -> None:
    write([{"question": f"{i}+1=", "answer": i + 1} for i in range(5)])
    output = run(task="additions", images=None)
    assert output.index("the first 3 rows as they will be asked:") < output.index("prepare out")
    assert [f"user    {i}+1=" in output for i in range(5)] == [True] * 3 + [False] * 2
    assert "─ example 2: additions (text) " in output
    assert "answer  3" in output
    with pytest.raises(UserError, match="out: already there"):
        run(task="additions", images=None)


def test_a_preview_writes_only_a_page_that_escapes_and_loads_nothing() -> None:
    good = {"question": ODD, "answer": "3", "image": photo("photo.png")}
    bad = {"question": "?", "answer": "3", "image": "https://<b>.example.org/x.png\x1b[0m"}
    write([good, bad, {**good, "question": "Is <image> a photo?"}, "no row", good, good])
    output = run("--preview", "--max-bad", "0")
    assert not Path("out").exists()
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["out.preview.html", "photo.png", "rows.jsonl"]
    page = Path("out.preview.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; [bold]\\x1b[31m\\u202e1+1=?" in page
    assert "<script" not in page
    assert "<b>.example" not in page
    assert not {*"\x1b\u202e"} & {*page, *output}
    assert set(re.findall(r"""(?:src|href)=["']?([^"']{5})""", page)) == {"data:"}
    assert "default-src 'none'; img-src data:" in page
    assert not re.search(r"url\(|@import|<link|<iframe", page)
    assert page.count("<img ") == 3
    assert "Of 5 examples: 3 rows, 0 not wanted, 2 bad" in page
    assert len(page) < 1_500_000  # the file of one photo has 2.4 MB
    flat = re.sub(r"[\s│┃]+", " ", output)
    assert "[image 1: 900 x 900 pixels, PNG, 2,3" in flat
    assert "Is [image 1: 900 x 900 pixels" in flat
    assert "1 image by URL example 1: 'https://<b>.example.org/x.png\\x1b[0m': images are not fetched" in flat
    assert "1 no object example 3: an example must be an object with columns, and is str" in flat


def test_a_page_has_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    photo("photo.png", 200)
    write([{"question": "x" * 100_000, "answer": "3", "image": ["photo.png"] * 20}])
    run("--preview")
    page = Path("out.preview.html").read_text(encoding="utf-8")
    assert page.count("<img ") == ITEMS
    assert page.count("not shown, because the page is full") == 20 - ITEMS
    assert "... (100,000 characters)" in page
    monkeypatch.setattr(preview, "PAGE_IMAGES", 300_000)
    run("--preview")
    assert Path("out.preview.html").stat().st_size < 400_000


def test_an_image_that_is_too_large_for_a_page_is_named() -> None:
    file = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(file, "PNG")
    Path("photo.png").write_bytes(file.getvalue())
    write([{"question": "?", "answer": "3", "image": "photo.png"}])
    run("--preview")
    assert "an image cannot be decoded: 9000 x 9000 pixels" in Path("out.preview.html").read_text(encoding="utf-8")


def test_clips_are_shown_as_frames() -> None:
    Path("films.py").write_text(CONVERTER, encoding="utf-8")
    output = CliRunner().invoke(app, ["prepare", "films.py", "out", "--preview"], catch_exceptions=False).output
    assert "[clip 1: 4 frames, 64 x 32 pixels, PNG" in output
    assert Path("out.preview.html").read_text(encoding="utf-8").count("<img ") == 4 + 5 + 6


def test_a_preview_of_data_without_a_row_says_why() -> None:
    write([{"question": "1+1="}] * 600)
    with pytest.raises(DataError, match=r"out: none of 500 examples became a row; .*\n  500 x no answer\n"):
        run("--preview", task="additions", images=None)
    assert not Path("out.preview.html").exists()


def test_no_more_examples_are_read_than_are_shown() -> None:
    write([{"question": f"{i}+1=", "answer": i + 1} for i in range(50)])
    rows, count = first_rows(GENERIC, ["data=rows.jsonl", "task=additions"])
    assert [(row.number, row.prompt.answer, row.tokens) for row in rows] == [
        (0, "1", None),
        (1, "2", None),
        (2, "3", None),
    ]
    assert count.examples == 3


def test_a_message_about_bad_data_does_not_control_the_terminal() -> None:
    write([{"question": "?", "answer": "3", "image": "\x1b[31mred.png\u202e"}])
    with pytest.raises(DataError, match=r"1 x no image file\n.*\\x1b\[31mred\.png\\u202e"):
        run()
