"""Metrics of a run: the file, and the values that a step records."""

import json
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mmopd.algorithm.settings import Algorithm, Margin
from mmopd.config import Recipe, Student
from mmopd.errors import DataError
from mmopd.modality import Encoder
from mmopd.records import Absent, Encoded, Outcome, Prompt, Response, Sample, Score
from mmopd.report.charts import curves
from mmopd.report.metrics import JsonLines, MetricsWriter, Tail, read_lines
from mmopd.runtime.rank_processes import LAST_BYTES, last_metrics
from mmopd.runtime.run_folder import RunFolder
from mmopd.runtime.step_lines import NewSteps
from mmopd.train.batch import build_batch
from mmopd.train.recorder import Recorder


def test_a_step_is_one_line_and_a_value_that_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsWriter(path, 0)) as writer:
        writer.write(0, {"return": -0.5, "accuracy/digit_sum": 0.25, "grad_norm": math.nan})
        writer.write(1, {"return": -0.25, "accuracy/digit_sum": 0.5})
    assert read_lines(path) == [
        {"step": 0, "return": -0.5, "accuracy/digit_sum": 0.25, "grad_norm": None},
        {"step": 1, "return": -0.25, "accuracy/digit_sum": 0.5},
    ]


def test_a_name_that_is_explained_nowhere_is_refused(tmp_path: Path) -> None:
    with (
        closing(MetricsWriter(tmp_path / "metrics.jsonl", 0)) as writer,
        pytest.raises(ValueError, match="'retrun' is not explained"),
    ):
        writer.write(0, {"retrun": 1.0})


def test_a_resumed_run_removes_what_is_later_than_its_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with closing(MetricsWriter(path, 0)) as writer:
        for step in range(4):
            writer.write(step, {"loss": float(step)})
    path.write_bytes(path.read_bytes()[:-4])
    assert [r["step"] for r in read_lines(path)] == [0, 1, 2]
    with closing(MetricsWriter(path, 2)) as writer:
        writer.write(2, {"loss": 20.0})
    assert [(r["step"], r["loss"]) for r in read_lines(path)] == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_a_run_that_starts_over_keeps_nothing(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "samples.jsonl", 0)
    lines.append({"step": 0})
    lines.close()
    JsonLines(tmp_path / "samples.jsonl", 0).close()
    assert (tmp_path / "samples.jsonl").read_bytes() == b""


def test_a_reader_gets_whole_lines_once_and_is_told_when_a_resume_has_removed_some(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == ([], False)
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n{"st')
    assert tail.read() == ([{"step": 0}, {"step": 1}], False)
    with path.open("ab") as file:
        file.write(b'ep": 2}\n')
    assert tail.read() == ([{"step": 2}], False)
    assert tail.read() == ([], False)
    with closing(JsonLines(path, 1)) as lines:
        for step in range(1, 5):  # more than were removed
            lines.append({"step": step})
    assert tail.read() == ([{"step": step} for step in range(5)], True)
    JsonLines(path, 5).close()  # removes nothing
    assert tail.read() == ([], False)


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


def test_what_a_step_tells_of_the_algorithm_has_a_panel(recorded: Line) -> None:
    shown = {
        chart["title"]: [s["name"] for s in chart["series"]]
        for chart in curves([recorded(Algorithm(balance=None), STEP)])
    }
    assert shown == {
        "Accuracy of the rollouts": ["charts", "sums"],
        "Right responses": ["sampled", "kept"],
        "Return": ["all", "right", "wrong"],
        "Reverse KL": ["all tasks", "charts", "sums"],
        "Reverse KL by teacher": ["t", "t+u", "u"],
        "Entropy, estimated": ["entropy_estimate"],
        "Response length": ["response_length"],
        "Order consistency": ["before", "after"],
        "Margin reached": ["before", "after"],
        "Margins": ["before", "after"],
        "Shift": ["shift"],
        "Cut, unknown, without a score": ["cut", "unknown", "without a score"],
        "Where responses went": ["kept"],
    }


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"stel": 1}', b"\xff\xfe", b"[" * 9999])
def test_a_damaged_line_that_a_run_shows_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.touch()
    new = NewSteps(path)
    path.write_bytes(b'{"step": 0, "seconds": 1.0}\n' + line + b"\n")
    for read in (new.read, lambda: last_metrics(path)):
        with pytest.raises(DataError, match=r"metrics\.jsonl: the line that begins with .* is damaged"):
            read()


def test_the_last_line_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_metrics(path) is None
    rows = [{"step": 0}, {"step": 1} | {f"accuracy/{i}": 0.5 for i in range(20_000)}]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    assert path.stat().st_size > 4 * LAST_BYTES
    assert last_metrics(path) == rows[1]
    path.write_text(json.dumps(rows[1]), encoding="utf-8")
    assert last_metrics(path) is None
