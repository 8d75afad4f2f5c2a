"""Responses token by token: what is recorded, which are shown, and how."""

import base64
import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from run_folders import png, row

from mmopd.records import Absent, Encoded, Outcome, Prompt, Response, Sample, Score
from mmopd.report import heatmap
from mmopd.report.heatmap import as_json, cells, choose, clipped, picture, token_row
from mmopd.report.metrics import JsonLines
from mmopd.report.run_files import RunFiles
from mmopd.runtime.run_folder import RunFolder
from mmopd.train.recorder import SHOWN, shown


def read(run: Path) -> list[heatmap.Response]:
    files = RunFiles(RunFolder(run))
    responses = files.responses(1000)
    assert not files.left_out
    return responses


def test_a_row_says_what_was_sampled_scored_and_learned() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What is their sum?"}]
    prompt = Prompt("digits/7", "digit_sum", "image", ({"role": "user", "content": parts},), (b"image",), "8")
    response = Response((5, 6), (-0.1, -0.2), "=8", "stop", (("step-2", 1), ("step-3", 1)))
    sample = Sample(0, response, Outcome(math.nan, "no key"), Score("image_teacher", (-0.3, -0.1)))
    made = token_row(3, prompt, sample, ["=", "8"], [0.25, 0.5], kept=False)
    assert made.images == [base64.b64encode(b"image").decode()]
    assert (made.prompt, made.outcome, made.verdict, made.reason, made.kept) == (
        "What is their sum?",
        None,
        "unknown",
        "no key",
        False,
    )
    assert made.reward == pytest.approx((-0.2 + 0.1) / 2)
    with pytest.raises(ValueError, match="digits/7 has no score"):
        token_row(
            3, prompt, Sample(0, response, Outcome(1.0), Absent("t", "timeout")), ["=", "8"], [0.0, 0.0], kept=False
        )


def test_rows_survive_the_way_through_the_file_to_four_digits(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "samples.jsonl", 0)
    lines.append(as_json(row(prompt="a\u2028b", student=[-0.123456] * 5, answer="8")))
    lines.close()
    [back] = read(tmp_path)
    assert (back.row.prompt, back.row.student, back.row.answer) == ("a\u2028b", [-0.1235] * 5, "8")


def test_what_the_image_does_is_part_of_a_row_where_it_was_asked_and_a_row_without_it_reads_as_before(
    tmp_path: Path,
) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What is their sum?"}]
    prompt = Prompt("digits/7", "digit_sum", "image", ({"role": "user", "content": parts},), (b"image",), "8")
    sample = Sample(
        0, Response((5, 6), (-0.1, -0.2), "=8", "stop", (("s", 2),)), Outcome(1.0), Score("t", (-0.3, -0.1))
    )
    rows = [
        token_row(0, prompt, sample, ["=", "8"], [0.2, 0.1], kept=True, visual=visual)
        for visual in ([-0.123456, 2.0], None)
    ]
    lines = JsonLines(tmp_path / "samples.jsonl", 0)
    for made in rows:
        lines.append(as_json(made))
    old = as_json(rows[1])
    del old["visual"], old["answer"]  # a run of a version without these keys
    lines.append(old)
    lines.close()
    seen, unasked, before = read(tmp_path)
    assert seen.row.visual == [-0.1235, 2.0]
    assert [(c["visual"], round(c["line"], 3)) for c in cells(seen.row)] == [(-0.1235, -0.041), (2.0, 0.667)]
    assert replace(unasked.row, answer="") == before.row
    assert [(c["visual"], c["line"]) for c in cells(before.row)] == [(None, 0.0)] * 2
    assert choose([unasked, seen]) == ([seen], [unasked])


def test_wrong_responses_of_the_last_step_come_first_then_those_of_the_first_step() -> None:
    responses = [
        clipped(row(step, task, outcome), 10)
        for step in (0, 5, 9)
        for task in ("digit_sum", "additions")
        for outcome in (1.0, 0.0, 0.0, 0.0, None)
    ]
    first, others = choose(responses)
    assert [(r.row.task, r.row.step, r.row.verdict) for r in first] == [
        (task, step, verdict)
        for task in ("additions", "digit_sum")
        for step in (9, 0)
        for verdict in ("wrong", "wrong", "unknown", "right")
    ]
    assert len(first) + len(others) == len(responses)
    assert [(r.row.step, r.row.verdict) for r in others][:3] == [(9, "wrong"), (9, "wrong"), (5, "wrong")]
    assert choose([]) == ([], [])


def test_a_long_response_keeps_its_first_and_last_tokens_and_the_means_of_all() -> None:
    T = 5_000
    lists = {"student": [-1.0] * T, "teacher": [-1.0] * (T - 1) + [-1.0 - T], "advantage": [2.0] * T}
    response = clipped(row(tokens=[str(i) for i in range(T)], **lists), 300)
    assert (response.tokens, len(response.row.tokens), response.head) == (T, 300, 200)
    assert response.row.tokens[199:201] == ["199", "4900"]
    assert (response.reward, response.advantage, response.row.images) == (pytest.approx(-1.0), 2.0, [])


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"student": [-0.1]}, "5 tokens, but 1, 5, 5 values"),
        ({"visual": [0.1]}, "5 tokens, but 5, 5, 5, 1 values"),
        ({"teacher": [math.nan] * 5}, "not finite"),
        ({"advantage": [1e300] * 5}, "not finite"),
        ({"outcome": 3.0}, "outcome 3.0"),
        ({"tokens": [], "student": [], "teacher": [], "advantage": []}, "no tokens"),
    ],
)
def test_a_row_that_is_no_response_is_refused(more: dict[str, object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        row(**more).check()


def test_colour_is_teacher_minus_student_and_is_bounded() -> None:
    assert [round(c["colour"], 4) for c in cells(row())] == [-0.0333, 0.0, 0.0, -1.0, 0.1333]


@pytest.mark.parametrize(
    ("token", "seen"), [(" ", "␣"), (" the", " the"), ("\n\n", "⏎⏎"), (".\n", ".⏎"), ("\x07", r"\x07"), ("", "")]
)
def test_every_token_can_be_seen(token: str, seen: str) -> None:
    [cell] = cells(row(tokens=[token], student=[0.0], teacher=[0.0], advantage=[0.0]))
    assert cell["text"] == seen


def test_a_large_image_is_shown_smaller_and_a_small_one_as_it_is() -> None:
    assert picture(png(64, 32)) == (f"data:image/png;base64,{png(64, 32)}", 64, 32)
    url, width, height = picture(png(2000, 1000))
    assert (width, height) == (640, 320)
    assert url.startswith("data:image/jpeg;base64,")


def encoded(image: Image.Image, form: str, **more: object) -> str:
    file = io.BytesIO()
    image.save(file, format=form, **more)  # type: ignore[arg-type]
    return base64.b64encode(file.getvalue()).decode()


def test_an_image_is_shown_upright_and_in_a_format_that_browsers_know() -> None:
    lying = Image.Exif()
    lying[0x0112] = 6
    url, width, height = picture(encoded(Image.new("RGB", (2000, 1000)), "JPEG", exif=lying))
    shown = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert (width, height) == shown.size == (320, 640)
    assert picture(encoded(Image.new("CMYK", (20, 10)), "TIFF"))[0].startswith("data:image/png;base64,")


@pytest.mark.parametrize("image", ["", "????", base64.b64encode(b"\x89PNG\r\n\x1a\n").decode(), png(64, 32)[:90]])
def test_an_image_that_does_not_decode_is_an_error_that_says_so(image: str) -> None:
    with pytest.raises(ValueError, match="cannot be decoded"):
        picture(image)


def test_an_image_with_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap, "PIXELS", 1000)
    with pytest.raises(ValueError, match="64 x 32 pixels"):
        picture(png(64, 32))


def test_wrong_responses_are_recorded_as_long_as_there_are_any() -> None:
    """A step with 40 prompts of a task, one of which has a wrong response, and one has an unknown outcome."""
    prompts = [Encoded(Prompt(f"s/{i}", "sums", "text", (), (), ""), (1,), (1,), ()) for i in range(40)]
    response = Response((5,), (-0.1,), "8", "stop", (("step-0", 1),))
    outcomes = {(37, 1): 0.0, (38, 0): math.nan}
    samples = [
        Sample(i, response, Outcome(outcomes.get((i, place), 1.0)), Score("t", (-0.3,)))
        for i in range(40)
        for place in range(2)
    ]
    chosen = [samples[i] for i in shown(prompts, samples, 0.5)]
    assert [s.outcome.value for s in chosen][:2] == [0.0, 1.0]
    assert sum(not s.outcome.known for s in chosen) == 1
    assert len(chosen) == len({s.group for s in chosen}) == SHOWN
