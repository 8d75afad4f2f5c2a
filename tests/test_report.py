"""Token samples and the report page."""

import base64
import io
import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from mmopd import settings_file
from mmopd.algorithm.settings import Algorithm
from mmopd.config import Recipe, Student
from mmopd.errors import UserError
from mmopd.evaluate import BenchmarkScore, Results, Row
from mmopd.records import Absent, Outcome, Prompt, Response, Sample, Score
from mmopd.report.heatmap import TokenRow, as_json, cells, choose, picture, read_rows, token_row
from mmopd.report.html import curves, script_json, write_report
from mmopd.report.metrics import JsonLines, MetricsWriter, documented


def png(width: int, height: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def row(step: int = 0, task: str = "digit_sum", outcome: float | None = 1.0, **more: object) -> TokenRow:
    values: dict[str, object] = {
        "step": step,
        "task": task,
        "modality": "image",
        "prompt": "What is their sum?",
        "images": [png(64, 32)],
        "tokens": ["3", "+", "5", "=", "8"],
        "student": [-0.1, -0.2, -0.3, -0.4, -0.5],
        "teacher": [-0.2, -0.2, -0.3, -6.4, -0.1],
        "advantage": [0.1, 0.2, 0.2, -5.8, 0.6],
        "outcome": outcome,
        "teacher_name": "image_teacher",
        "kept": True,
    }
    return TokenRow(**(values | more))  # type: ignore[arg-type]


# Samples.


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
    lines.append(as_json(row(prompt="a\u2028b", student=[-0.123456] * 5)))
    lines.close()
    [back] = read_rows(tmp_path / "samples.jsonl")
    assert (back.prompt, back.student) == ("a\u2028b", [-0.1235] * 5)


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
    del old["visual"]  # a run of a version without this key
    lines.append(old)
    lines.close()
    seen, unasked, before = read_rows(tmp_path / "samples.jsonl")
    assert seen.visual == [-0.1235, 2.0]
    assert [(c["visual"], round(c["line"], 3)) for c in cells(seen)] == [(-0.1235, -0.041), (2.0, 0.667)]
    assert unasked == before
    assert [(c["visual"], c["line"]) for c in cells(before)] == [(None, 0.0)] * 2
    assert choose([unasked, seen]) == [seen]


def test_the_handful_has_right_and_wrong_of_each_task_early_and_late() -> None:
    rows = [
        row(step, task, outcome)
        for step in (0, 5, 9)
        for task in ("additions", "digit_sum")
        for outcome in (1.0, 0.0, 0.0)
    ]
    assert [(r.step, r.task, r.verdict) for r in choose(rows)] == [
        (step, task, verdict)
        for step in (0, 9)
        for task in ("additions", "digit_sum")
        for verdict in ("right", "wrong")
    ]
    assert len(choose(rows, limit=3)) == 3
    assert choose([]) == []
    assert choose([row(tokens=[], student=[], teacher=[], advantage=[])]) == []


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


# The page.


def write_run(run: Path) -> Path:
    """Write a small but complete run folder."""
    (run / "difficulty").mkdir(parents=True)
    recipe = Recipe(
        student=Student(model=Path("models/base")), fleet=Path("teachers/f.yaml"), mixture=Path("data/m.yaml")
    )
    (run / "recipe.yaml").write_text(settings_file.dump(recipe), encoding="utf-8")
    (run / "versions.json").write_text(json.dumps({"mmopd": "1.2.3", "torch": "9.9"}), encoding="utf-8")
    (run / "stages.json").write_text(json.dumps({"serve": 30.0, "distil": 170.0}), encoding="utf-8")
    source = {"correct": [0, 2, 2, 1], "attempts": [2, 2, 2, 2], "shape": "flat", "weights": [1.0, 1.0, 1.0, 2.0]}
    (run / "difficulty" / "difficulty.json").write_text(
        json.dumps({"version": 2, "sources": {"digits": source}}), encoding="utf-8"
    )
    with MetricsWriter(run) as writer:
        for step in range(20):
            writer.write(
                step,
                {
                    "return": -0.2 + step / 100,
                    "accuracy/digit_sum": 0.4,
                    "absent": 0,
                    "share/kept": 0.5,
                    "seconds/rollout": 1.5,
                },
            )

    def record(model: str, score: float | None) -> BenchmarkScore:
        status, reason = ("ok", "") if score is not None else ("failed", "3 of 8 requests failed")
        return BenchmarkScore(
            model, "student", "Digits", "t", "m", status, reason, score, 1.0, 8, "w", "d", {}, {}, 1.0
        )  # type: ignore[arg-type]

    rows = [
        Row("base", "base", (record("base", 40.0),)),
        Row("t", "teacher", (record("t", 90.0),)),
        Row("distilled", "distilled", (record("distilled", 70.0),)),
    ]
    Results.of([*rows, Row("other", "teacher", (record("other", None),))]).write(run)
    samples = JsonLines(run / "samples.jsonl", 0)
    samples.append(as_json(row(prompt="is 1 < 2 & </script><b>?", tokens=["</script>", "<img src=x>", "5", "=", "8"])))
    samples.append(as_json(row(step=19, visual=[0.0, -0.5, 3.5, 1.25, 0.5])))
    samples.close()
    return run


@pytest.fixture
def page(tmp_path: Path) -> str:
    return write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")


def test_the_report_needs_nothing_but_itself(page: str) -> None:
    ours = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)|@import|url\((?!data:)", ours)
    assert page.count("plotly.js v") == 1


def test_the_report_shows_results_curves_difficulty_time_and_tokens(page: str) -> None:
    for title in ("Results", "Training", "Difficulty", "Responses, token by token", "Time"):
        assert f"<h2>{title}" in page
    assert "<b>60 %</b> <span>of the gap closed</span>" in page
    assert "other, Digits: 3 of 8 requests failed" in page
    assert "3 min 20 s in all" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert [chart["title"] for chart in data["curves"]] == [
        "Accuracy of the rollouts",
        "Return",
        "Where responses went",
        "Time of a step",
    ]
    assert [s["name"] for s in data["curves"][2]["series"]] == ["kept"]
    assert data["difficulty"][0]["before"] == [0.25, 0.25, 0.5]
    assert data["difficulty"][0]["after"] == [0.2, 0.4, 0.4]


def test_the_report_shows_what_the_image_does_for_each_token_where_that_was_asked(page: str) -> None:
    without, image = re.findall(r"<article.*?</article>", page, re.DOTALL)
    assert "--seen" not in without
    assert "<span>image" not in without
    assert re.findall(r"--seen:var\(--(\w+)\);--b:([0-9.]+)", image) == [
        ("with", "0.00"),
        ("without", "0.17"),
        ("with", "1.00"),
        ("with", "0.42"),
        ("with", "0.17"),
    ]
    assert image.count('|1.250">=</span>') == 1
    assert "<span>image <b>+0.950</b></span>" in image
    assert "likelier without the image" in page


def test_a_report_without_visual_advantage_does_not_speak_of_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "samples.jsonl").write_text(lines[0], encoding="utf-8")
    assert "without the image" not in write_report(run).read_text(encoding="utf-8")


def test_margins_are_a_band_around_their_median() -> None:
    margins = {
        f"margin/p{q}_{when}": q / 100 + later
        for q in (10, 50, 90)
        for when, later in (("before", 0.0), ("after", 1.0))
    }
    [chart] = curves([{"step": 3} | margins, {"step": 4}])
    before, after = chart["series"]
    assert (before["name"], before["low"], before["y"], before["high"]) == (
        "before",
        [0.1, None],
        [0.5, None],
        [0.9, None],
    )
    assert (after["name"], after["low"], after["y"], after["high"]) == ("after", [1.1, None], [1.5, None], [1.9, None])


def test_a_run_without_teachers_has_a_report(tmp_path: Path) -> None:
    algorithm = Algorithm.model_validate({"objective": {"kind": "grpo"}})
    (tmp_path / "recipe.yaml").write_text(
        settings_file.dump(Recipe(student=Student(model=Path("m")), mixture=Path("d"), algorithm=algorithm)),
        encoding="utf-8",
    )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<dd>grpo</dd>" in page
    assert "<dt>Fleet</dt><dd>none</dd>" in page


def test_scoring_and_visual_advantage_have_their_panels() -> None:
    numbers = {
        "scoring/requests": 90.0,
        "scoring/reused": 6.0,
        "scoring/hedged": 0.0,
        "scoring/failed/timeout": 2.0,
    }
    numbers |= {"visual_advantage/charts": 0.2, "visual_advantage/clock": 0.5, "scored_blind": 4.0, "absent_blind": 1.0}
    assert all(documented(name) for name in numbers)
    shown = {
        chart["title"]: [s["name"] for s in chart["series"]]
        for chart in curves([{"step": 0} | numbers, {"step": 1} | numbers])
    }
    assert shown == {
        "Visual advantage": ["charts", "clock"],
        "Scoring": ["requests", "reused"],
        "Scoring faults": ["failed/timeout", "absent_blind"],
    }


def test_what_a_model_wrote_stays_text(page: str) -> None:
    assert "is 1 &lt; 2 &amp; &lt;/script&gt;&lt;b&gt;?" in page
    assert "<img src=x>" not in page
    assert script_json({"x": "</script>\u2028"}) == '{"x":"\\u003c/script>\\u2028"}'


def test_a_run_that_has_just_begun_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        settings_file.dump(Recipe(student=Student(model=Path("m")), fleet=Path("f"), mixture=Path("d"))),
        encoding="utf-8",
    )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<h2>" not in page
    assert "0 of 100 steps" in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


def test_a_number_that_was_not_finite_is_a_gap_in_the_curve() -> None:
    [chart] = curves([{"step": 0, "loss": 1.0}, {"step": 1, "loss": None}, {"step": 2, "loss": 3.0}])
    assert chart["series"] == [{"name": "loss", "x": [0, 1, 2], "y": [1.0, None, 3.0]}]
