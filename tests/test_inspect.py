"""`mmopd inspect`: rows and responses by filters, and as each model reads them; damaged ones; pages."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from run_folders import row
from typer.testing import CliRunner

from mmopd.cli import app
from mmopd.demo import world
from mmopd.errors import UserError
from mmopd.prompts import Shards, write_shards
from mmopd.records import Prompt
from mmopd.report.heatmap import as_json, clipped
from mmopd.report.inspection.found import surprises
from mmopd.report.inspection.terminal import _blocks

FLEET = """
teachers:
  told: {model: t, view: privileged}
  blind: {model: t, view: blank}
  reader: {model: t, view: caption}
  plain: {model: t}
routes:
  - {modality: text, teacher: told}
  - {modality: image, teacher: {blind: 1, reader: 1, plain: 1}}
"""
MIXTURE = "sources: {sums: {shards: sums, task: additions}, digits: {shards: digits, task: digit_sum}}"


def picture(colour: str = "white") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 32), colour).save(file, format="PNG")
    return file.getvalue()


def prompt(task: str, text: str, answer: str, *images: bytes) -> Prompt:
    parts = [*[{"type": "image"}] * len(images), {"type": "text", "text": text}]
    return Prompt("", task, "image" if images else "text", ({"role": "user", "content": parts},), images, answer)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with two sources, counts of one, a fleet with views, and a run of three responses."""
    here = tmp_path_factory.mktemp("inspect")
    sums = [prompt("additions", f"What is {i}+1?", str(i + 1)) for i in range(6)]
    write_shards(sums, here / "sums", max_rows=4)
    write_shards([prompt("digit_sum", "<b>Sum?", "3", picture()) for _ in range(3)], here / "digits")
    lines = [{"version": 2, "made_from": {"data": Shards(here / "sums").fingerprint}}]
    lines += [[i, *pair] for i, pair in enumerate([(0, 4), (1, 4), (4, 4), (0, 0), (0, 4), (2, 4)])]
    (here / "sums" / "difficulty").mkdir()
    (here / "sums" / "difficulty" / "a.jsonl").write_text(
        "".join(f"{json.dumps(x)}\n" for x in lines), encoding="utf-8"
    )
    for folder in ("data", "teachers", "recipes"):
        (here / folder).mkdir()
    (here / "data" / "mine.yaml").write_text(MIXTURE, encoding="utf-8")
    (here / "teachers" / "mine.yaml").write_text(FLEET, encoding="utf-8")
    recipe = "student: {model: student}\nfleet: teachers/mine.yaml\nmixture: data/mine.yaml\n"
    (here / "recipes" / "mine.yaml").write_text(recipe, encoding="utf-8")
    (here / "run").mkdir()
    (here / "run" / "recipe.yaml").write_text(recipe, encoding="utf-8")
    responses = [
        row(key="digits/1", tokens=["</script>", "<img src=x>", "5", "=", "8"]),
        row(key="sums/4", task="additions", outcome=0.0, images=[], teacher_name="told", student=[-9.0, *[-0.1] * 4]),
        row(key="sums/1", task="additions", images=[], teacher_name="told+plain"),
    ]
    write_samples(here / "run" / "samples.jsonl", *map(as_json, responses))
    world.build_processor().save_pretrained(here / "student")
    return here


def write_samples(path: Path, *rows: object) -> None:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in rows), encoding="utf-8")


@pytest.fixture(autouse=True)
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def printed(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["inspect", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def found(*arguments: str) -> dict:
    return json.loads(printed(*arguments, "--json"))


def keys(*arguments: str) -> list[str]:
    return [one["key"] for one in found(*arguments)["shown"]]


def test_rows_are_shown_with_images_answer_and_difficulty() -> None:
    text = printed("data/mine.yaml", "--rows", "3")
    assert "data/mine.yaml: 3 of 9 rows" in text
    assert re.search(r"user +What is 0\+1\?", text)
    assert re.search(r"answer +1 ", text)
    assert "the untrained student is never right: 0 of 4" in text
    assert "[image 1: 64 x 32 pixels, PNG" in text
    assert [*map(str, keys("data/mine.yaml", "--rows", "3"))] == ["sums/0", "digits/0", "sums/1"]  # in turn


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sums", "--difficulty", "never"], ["sums/0", "sums/4"]),
        (["sums", "--difficulty", "unjudged"], ["sums/3"]),
        (["data/mine.yaml", "--difficulty", "always"], ["sums/2"]),
        (["data/mine.yaml", "--source", "digits", "--rows", "2"], ["digits/0", "digits/1"]),
        (["data/mine.yaml", "--row", "digits/2", "--row", "sums/5"], ["sums/5", "digits/2"]),
        (["data/mine.yaml", "--teacher", "reader", "--recipe", "recipes/mine.yaml", "--rows", "1"], ["digits/0"]),
        (["sums/shard-00001-of-00002.tar"], ["sums/4", "sums/5"]),
        (["sums/shard-00001-of-00002.index.safetensors", "--difficulty", "sometimes"], ["sums/5"]),
        (["run"], ["sums/4", "digits/1", "sums/1"]),
        (["run", "--outcome", "right", "--rows", "1"], ["sums/1"]),
        (["run", "--teacher", "told"], ["sums/4", "sums/1"]),
        (["run", "--source", "digits"], ["digits/1"]),
        (["run/samples.jsonl", "--difficulty", "never"], ["sums/4"]),
    ],
    ids=" ".join,
)
def test_filters_choose(arguments: list[str], expected: list[str]) -> None:
    assert keys(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing: no such file or folder; give a folder of shards"),
        (["teachers"], "teachers: nothing here that can be inspected; give a folder of shards"),
        (["none.jsonl"], "none.jsonl: no such file"),
        (
            ["data/mine.yaml", "--source", "digit"],
            "--source: no source 'digit' in data/mine.yaml; did you mean 'digits'",
        ),
        (["run", "--source", "digit"], "no response to 'digit' in run; did you mean 'digits'"),
        (["run", "--teacher", "tolt"], "no response of 'tolt' in run; did you mean 'told'"),
        (["sums", "--outcome", "right"], "--outcome: sums has prompts without answers; give a run"),
        (
            ["sums", "--teacher", "told"],
            "--teacher: the recipe says which teacher gets a prompt; give it with --recipe",
        ),
        (["digits", "--difficulty", "never"], "no counts next to digits; `mmopd difficulty RECIPE` measures them"),
        (["sums", "--row", "sums/6"], "no row 'sums/6' in sums, whose rows are sums/0 to sums/5"),
        (["sums", "--row", "sums/٣"], "no row 'sums/٣' in sums"),
        (["run", "--json", "--page", "x.html"], "choose one of them"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_what_cannot_be_chosen_is_said(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        printed(*arguments)


def test_responses_of_an_earlier_version_are_shown_but_not_chosen_by_their_rows(tmp_path: Path) -> None:
    old = as_json(row())
    del old["key"]
    write_samples(tmp_path / "old.jsonl", old)
    assert found(str(tmp_path / "old.jsonl"))["matching"] == 1
    with pytest.raises(UserError, match="an earlier version recorded these responses, without the rows"):
        printed(str(tmp_path / "old.jsonl"), "--source", "digits")


def test_each_model_reads_the_prompt_as_in_a_run(here: Path) -> None:
    shown = found("data/mine.yaml", "--rows", "2", "--recipe", "recipes/mine.yaml")["shown"]
    student, told = shown[0]["seen"]
    assert (student["reader"], told["reader"]) == ("student", "told")
    assert student["text"].startswith("<|im_start|>user\nWhat is 0+1?<|im_end|>")
    assert told["text"].startswith("<|im_start|>user\nWhat is 0+1?\nThe answer is 1.<|im_end|>")
    assert student["tokens"] == len(student["ids"]) < told["tokens"]
    student, blind, reader, plain = shown[1]["seen"]
    assert student["ids"] == blind["ids"] == plain["ids"]
    assert len(student["ids"]) + 1 == student["tokens"]  # 64 x 32 pixels are two tokens
    assert blind["images"] != student["images"] == plain["images"]
    assert "the row has no text 'caption'" in reader["problem"]
    text = printed("data/mine.yaml", "--rows", "2", "--recipe", "recipes/mine.yaml")
    assert "as blind reads it (images: 'blank')" in text
    assert "the same ids and images as the student" in text
    page = written(here / "seen.html", "run", "--rows", "2", "--recipe", "recipes/mine.yaml")
    assert "The answer is 5.&lt;|im_end|&gt;" in page


def test_damaged_rows_are_named_and_the_others_are_shown(here: Path, tmp_path: Path) -> None:
    write_shards([prompt("additions", f"What is {i}+1?", str(i + 1)) for i in range(4)], tmp_path / "bad")
    (tar,) = (tmp_path / "bad").glob("*.tar")
    content = tar.read_bytes()
    tar.write_bytes(content.replace(b"What is 1+1?", b"What is 9+9?"))
    said = found(str(tmp_path / "bad"))
    assert [one["key"] for one in said["shown"]] == ["bad/0", "bad/2", "bad/3"]
    ((place,),) = [one["places"] for one in said["left_out"]]
    assert "row 1 cannot be read (its content is not what was indexed)" in place
    lines = [
        json.dumps(as_json(row(task="a"))),
        "{nonsense",
        json.dumps({"step": 1}),
        json.dumps(as_json(row(task="b"))),
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    said = found(str(tmp_path / "samples.jsonl"))
    assert said["matching"] == 2
    assert [place[:6] for place in said["left_out"][0]["places"]] == ["line 2", "line 3"]


def test_the_most_surprising_tokens_come_first_with_what_is_around_them() -> None:
    first = found("run")["surprising"][0]
    assert (first["token"], first["student_logprob"], first["teacher_logprob"]) == ("3", -9.0, -0.2)
    assert (first["place"], first["before"], first["after"]) == (1, "", "+5=8")
    text = printed("run")
    assert re.search(r"\+8\.80 .* 0\.00012 .* 0\.82 .* >>3<<\+5=8 .* additions, step 0, wrong; 1 of 5", text)


def test_places_in_a_long_response_count_the_tokens_that_are_left_out() -> None:
    whole = row(tokens=[str(i % 10) for i in range(2000)])
    far = [0.0] * 1998 + [-7.0, 0.0]
    whole = replace(whole, student=[0.0] * 2000, teacher=far, advantage=[0.0] * 2000)
    [first, *_] = surprises([clipped(whole, 1000)])
    assert (first.place, first.token, first.after, len(first.before)) == (1999, "8", "9", 12)


class Loads(HTMLParser):
    """Collects what a page would load, and the elements that stand in it."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.urls += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


def written(path: Path, *arguments: str) -> str:
    assert f"page: {path}" in printed(*arguments, "--page", str(path))
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", [["run"], ["data/mine.yaml", "--rows", "4"]], ids=" ".join)
def test_the_page_loads_nothing_and_escapes_what_it_shows(arguments: list[str], tmp_path: Path) -> None:
    page = written(tmp_path / "page.html", *arguments)
    loads = Loads()
    loads.feed(page)
    assert loads.urls
    assert all(url.startswith(("data:image/", "#")) for url in loads.urls)
    assert loads.tags.count("script") == 2
    assert "<b>Sum?" not in page
    assert "<img src=x>" not in page
    assert not re.search(r"@import|url\(", page)


def test_images_are_drawn_in_the_colours_of_their_pixels_on_a_terminal() -> None:
    image = Image.new("RGB", (60, 60), "red")
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=80)
    console.print(_blocks(image))
    drawn = console.file.getvalue()
    assert drawn.count("▀") == 32 * 16
    assert "38;2;255;0;0;48;2;255;0;0" in drawn
    assert "▀" not in printed("digits")  # no terminal


def test_a_picture_that_cannot_be_decoded_is_said(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples.jsonl", as_json(row(images=[base64.b64encode(b"none").decode()])))
    assert "an image cannot be decoded" in written(tmp_path / "page.html", str(tmp_path / "samples.jsonl"))
