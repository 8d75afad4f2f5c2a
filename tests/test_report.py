"""Metrics, token samples and the report page."""

import base64
import io
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from mmopd import settings_file
from mmopd.algorithm.settings import Algorithm, Margin
from mmopd.config import Recipe, Student
from mmopd.errors import UserError
from mmopd.evaluate import BenchmarkScore, Results, Row
from mmopd.modality import Encoder
from mmopd.records import Absent, Encoded, Outcome, Prompt, Response, Sample, Score
from mmopd.report.heatmap import TokenRow, as_json, cells, choose, picture, read_rows, token_row
from mmopd.report.html import curves, script_json, write_report
from mmopd.report.metrics import JsonLines, MetricsWriter, documented, read_lines
from mmopd.runtime.run_folder import RunFolder
from mmopd.train.batch import build_batch
from mmopd.train.recorder import Recorder


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


# Metrics.


def test_a_step_is_one_line_and_the_same_numbers_are_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"return": -0.5, "accuracy/digit_sum": 0.25, "grad_norm": math.nan})
        writer.write(1, {"return": -0.25, "accuracy/digit_sum": 0.5})
    assert read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 0, "return": -0.5, "accuracy/digit_sum": 0.25, "grad_norm": None},
        {"step": 1, "return": -0.25, "accuracy/digit_sum": 0.5},
    ]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("return")] == [(0, -0.5), (1, -0.25)]
    assert sorted(board.Tags()["scalars"]) == ["accuracy/digit_sum", "return"]


def test_a_name_that_is_explained_nowhere_is_refused(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="'retrun' is not explained"):
        writer.write(0, {"retrun": 1.0})


def test_a_resumed_run_removes_what_is_later_than_its_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(4):
            writer.write(step, {"loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-4])
    assert [r["step"] for r in read_lines(path)] == [0, 1, 2]
    with MetricsWriter(tmp_path, done=2) as writer:
        writer.write(2, {"loss": 20.0})
    assert [(r["step"], r["loss"]) for r in read_lines(path)] == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_a_run_that_starts_over_keeps_nothing(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "samples.jsonl", 0)
    lines.append({"step": 0})
    lines.close()
    JsonLines(tmp_path / "samples.jsonl", 0).close()
    assert (tmp_path / "samples.jsonl").read_bytes() == b""


# The record of a step.

PROMPTS = [
    Encoded(Prompt(f"s/{i}", task, "text", (), (), ""), (1,), (1,), ())
    for i, task in enumerate(("sums", "charts", "charts"))
]


Line = Callable[[Algorithm, list[Sample]], dict[str, float]]


def sample(group: int, outcome: float, student: list[float], reward: list[float], teacher: str = "t") -> Sample:
    """Return a sample whose teacher's log-probs are the student's plus the reward."""
    response = Response(tuple(range(len(student))), tuple(student), "", "stop", (("step-0", len(student)),))
    score = Score(teacher, tuple(s + r for s, r in zip(student, reward, strict=True)))
    return Sample(group, response, Outcome(outcome), score)


# Two right and two wrong responses to a prompt of one teacher (margin -0.2, as in the worked example of the margins),
# two to a prompt of another, one to a prompt of both. One has no score. One has a token that is 12 nats from its
# teacher and counts nowhere.
STEP = [
    sample(0, 1.0, [-1.0, -2.0], [0.3, -0.1]),
    sample(0, 1.0, [-0.5], [-0.3]),
    sample(0, 0.0, [-0.5, -0.5, -0.5, -0.5], [0.2, 0.6, 0.0, 0.0]),
    sample(0, 0.0, [-0.25], [0.0]),
    sample(1, 0.0, [-0.5, -1.0], [-0.4, -12.0], "u"),
    sample(1, math.nan, [-0.5], [-0.2], "u"),
    sample(2, 1.0, [-1.5], [0.5], "t+u"),
    Sample(2, Response((7,), (-2.0,), "", "stop", (("step-0", 1),)), Outcome(1.0), Absent("t", "timeout")),
]


@pytest.fixture
def recorded(tmp_path: Path, encoder: Encoder) -> Line:
    """Return the metrics that the recorder of a run writes, by name."""

    def record(algorithm: Algorithm, samples: list[Sample]) -> dict[str, float]:
        recipe = Recipe(student=Student(model=Path("m")), fleet=Path("f"), mixture=Path("m"), algorithm=algorithm)
        folder = RunFolder(tmp_path / str(len(list(tmp_path.iterdir()))))
        folder.create(recipe)
        with Recorder(folder, algorithm, encoder, steps=recipe.train.steps, done=0) as recorder:
            recorder.step(0, PROMPTS, samples, build_batch(samples, algorithm, 0), updates=[], more={})
        [line] = read_lines(folder.metrics)
        return line

    return record


def test_accuracy_is_told_of_the_students_own_responses_and_not_of_its_teachers_answers(recorded: Line) -> None:
    own = recorded(Algorithm(), STEP)
    of_teachers = recorded(
        Algorithm.model_validate({"objective": {"kind": "sft"}, "difficulty": None}),
        [s for s in STEP if s.score is not None],
    )
    assert {name for name in own if name.startswith(("accuracy/", "correct/sampled"))}
    assert not {name for name in of_teachers if name.startswith(("accuracy/", "correct/", "staleness"))}


def test_reverse_kl_is_told_by_task_and_by_teacher_over_the_tokens_that_count(recorded: Line) -> None:
    line = recorded(Algorithm(), STEP)
    assert line["reverse_kl"] == pytest.approx(-(0.7 - 0.4 - 0.2 + 0.5) / 11)
    assert line["reverse_kl/sums"] == pytest.approx(-0.7 / 8)
    assert line["reverse_kl/charts"] == pytest.approx((0.4 + 0.2 - 0.5) / 3)
    by_teacher = {"t": -0.7 / 8, "u": 0.6 / 2, "t+u": -0.5}
    assert {name: line[f"reverse_kl_teacher/{name}"] for name in by_teacher} == pytest.approx(by_teacher)


def test_a_step_tells_entropy_outcomes_order_margins_shift_and_where_responses_went(recorded: Line) -> None:
    line = recorded(Algorithm(balance=None), STEP)
    assert line["entropy_estimate"] == pytest.approx((3 + 0.5 + 2 + 0.25 + 1.5 + 0.5 + 1.5 + 2) / 13)
    assert line["response_length"] == 13 / 8
    assert (line["correct/sampled"], line["correct/kept"]) == pytest.approx((4 / 7, 3 / 6))
    for name, before, after in (
        ("order_consistency", 0, 1),
        ("order_delta", 0, 1),
        ("margin", -0.2, 0.4),
        ("two_sided_groups", 1, 1),
    ):
        assert (line[f"{name}/before"], line[f"{name}/after"]) == pytest.approx((before, after))
    assert [line[f"margin/p{q}_before"] for q in (10, 50, 90)] == pytest.approx([-0.2] * 3)
    assert line["shift"] == pytest.approx(4 * 0.3 / 7)
    shares = {"kept": 7 / 8, "balanced_away": 0, "masked": 0, "absent": 1 / 8, "unknown": 1 / 8}
    assert {name: line[f"share/{name}"] for name in shares} == pytest.approx(shares)
    masked = recorded(Algorithm(balance=None, margin=Margin(kind="mask")), STEP)
    assert (masked["share/masked"], masked["share/kept"]) == (2 / 8, 5 / 8)
    assert masked["margin/after"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("reason", "cause"),
    [
        ("timeout", "timeout"),
        ("ValueError: too: long", "ValueError"),
        ("the answer key 'B' is not a number", "the_answer_key"),
        ('the answer key "it\'s" is empty', "the_answer_key"),
        ("", "no_reason"),
    ],
)
def test_unknown_outcomes_are_counted_by_cause(reason: str, cause: str, recorded: Line) -> None:
    unknown = [replace(s, outcome=Outcome(math.nan, reason)) for s in STEP[:2]]
    line = recorded(Algorithm(), [*unknown, *STEP[2:]])
    assert line[f"unknown/{cause}"] == 2 + (reason == "")  # one of the others has no outcome either
    assert line["unknown"] == sum(n for name, n in line.items() if name.startswith("unknown/"))


def test_an_objective_without_a_teacher_has_no_divergence_and_one_without_samples_of_its_own_no_entropy(
    recorded: Line,
) -> None:
    grpo = Algorithm.model_validate({"objective": {"kind": "grpo"}})
    line = recorded(grpo, [Sample(s.group, s.response, s.outcome, None) for s in STEP])
    assert not [name for name in line if name.startswith("reverse_kl")]
    assert {"entropy_estimate", "correct/sampled", "share/kept", "response_length"} <= line.keys()
    sft = Algorithm.model_validate({"objective": {"kind": "sft"}})
    line = recorded(sft, STEP[:7])
    assert not [name for name in line if name.startswith(("reverse_kl", "entropy"))]


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
    (run / "recipe.yaml").write_text(settings_file.dump(recipe))
    (run / "versions.json").write_text(json.dumps({"mmopd": "1.2.3", "torch": "9.9"}))
    (run / "stages.json").write_text(json.dumps({"serve": 30.0, "distil": 170.0}))
    source = {"correct": [0, 2, 2, 1], "attempts": [2, 2, 2, 2], "shape": "flat", "weights": [1.0, 1.0, 1.0, 2.0]}
    (run / "difficulty" / "difficulty.json").write_text(json.dumps({"version": 2, "sources": {"digits": source}}))
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
    return write_report(write_run(tmp_path / "run")).read_text()


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
    lines = (run / "samples.jsonl").read_text().splitlines(keepends=True)
    (run / "samples.jsonl").write_text(lines[0])
    assert "without the image" not in write_report(run).read_text()


def test_what_a_step_tells_of_the_algorithm_has_a_panel(recorded: Line) -> None:
    shown = {
        chart["title"]: [s["name"] for s in chart["series"]]
        for chart in curves([recorded(Algorithm(balance=None), STEP)])
    }
    assert shown == {
        "Accuracy of the rollouts": ["charts", "sums"],
        "Right responses": ["sampled", "kept"],
        "Return": ["return", "right", "wrong"],
        "Reverse KL by task": ["reverse_kl", "charts", "sums"],
        "Reverse KL by teacher": ["t", "t+u", "u"],
        "Entropy, estimated": ["entropy_estimate"],
        "Response length": ["response_length"],
        "Order consistency": ["after"],  # `before` is 0 throughout
        "Margin reached": ["after"],
        "Margins": ["before", "after"],
        "Shift": ["shift"],
        "Where responses went": ["kept", "absent", "unknown"],
    }


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
        settings_file.dump(Recipe(student=Student(model=Path("m")), mixture=Path("d"), algorithm=algorithm))
    )
    page = write_report(tmp_path).read_text()
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
        settings_file.dump(Recipe(student=Student(model=Path("m")), fleet=Path("f"), mixture=Path("d")))
    )
    page = write_report(tmp_path).read_text()
    assert "<h2>" not in page
    assert "0 of 100 steps" in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


def test_a_number_that_was_not_finite_is_a_gap_in_the_curve() -> None:
    [chart] = curves([{"step": 0, "loss": 1.0}, {"step": 1, "loss": None}, {"step": 2, "loss": 3.0}])
    assert chart["series"] == [{"name": "loss", "x": [0, 1, 2], "y": [1.0, None, 3.0]}]
