"""What the report says first, and the names and colours of its charts."""

import math

import pytest

from mmopd.evaluate import BenchmarkScore, Results, Row
from mmopd.report import verdict
from mmopd.report.charts import CHARTS, POINTS, Tasks, curves, tasks_of, thinned
from mmopd.report.facts import at_the_end, facts
from mmopd.report.html import stages
from mmopd.report.metrics import METRICS, documented


def results(**scores: tuple[float | None, float | None, float | None]) -> Results:
    """Return the scores of base, teacher and distilled on benchmarks of 100 questions, with a standard error of 3."""

    def record(model: str, column: str, score: float | None) -> BenchmarkScore:
        status = "ok" if score is not None else "failed"
        error = None if score is None else 0.0 if score in (0, 100) else 3.0
        return BenchmarkScore(model, "r", column, "t", "m", status, "", score, error, 100, "w", "d", {}, {}, 1.0)  # type: ignore[arg-type]

    names = ("base", "big", "distilled")
    kinds = ("base", "teacher", "distilled")
    return Results.of(
        [
            Row(name, kind, tuple(record(name, c, s[i]) for c, s in scores.items()))  # type: ignore[arg-type]
            for i, (name, kind) in enumerate(zip(names, kinds, strict=True))
        ]
    )


def said(found: Results | None, metrics: list[dict[str, float]], steps: int = 100) -> tuple[str, str, list[str]]:
    tasks = Tasks(tasks_of(metrics), found.columns if found else ())
    remarks = verdict.remarks(found, metrics, steps, 0, tasks)
    look = remarks[0] if remarks else verdict.nearest(found, tasks) if found else None
    one = verdict.sentence(found, metrics, tasks, student="base", objective="grpo", look=look)
    return (
        f"{one['what']} and {one['gained']} ({one['interval']})",
        look.short if look else "",
        [r.text for r in remarks],
    )


DONE = [{"step": step, "share/unknown": 0.0} for step in range(100)]


def test_the_verdict_says_from_whom_what_was_gained_and_where_most_is_left() -> None:
    half = 1.96 * math.hypot(3, 3)
    assert said(results(charts=(40, 80, 70), sums=(20, 60, 55)), DONE) == (
        "was distilled from big and gained 32.5 points on average over 2 benchmarks "
        f"(95 % interval +{32.5 - half / math.sqrt(2):.1f} to +{32.5 + half / math.sqrt(2):.1f})",
        "charts, where 25 % of the gap to big is left",
        [],
    )


def test_a_loss_a_failure_and_a_change_within_noise_come_first() -> None:
    text, look, remarks = said(results(a=(60, 90, 30), b=(50, 90, None), c=(50, 90, 52), d=(90, 50, 99)), DONE)
    assert text.startswith("was distilled from big and lost 6.3 points on average over 3 of 4 benchmarks")
    assert "gained 20.0 points on a, 1 of 2 benchmarks (" in said(results(a=(60, 90, 80), b=(50, 90, None)), DONE)[0]
    assert look == "the benchmarks that failed"
    assert remarks == [
        "Without a score: distilled on b.",
        "a fell: −30.0 (95 % interval −38.3 to −21.7).",
        "c: the change cannot be told from noise: +2.0 (95 % interval −6.3 to +10.3).",
        "d: no teacher leads the base by a point.",
    ]


def test_a_perfect_score_is_not_taken_as_certain() -> None:
    found = results(a=(0, 100, 100))
    gain = verdict.gain(found, "a")
    assert gain is not None
    assert gain.half == pytest.approx(3 * math.sqrt(2))
    assert verdict.gap_interval(found, "a") == pytest.approx((1 - 0.03 * math.sqrt(2), 1 + 0.03 * math.sqrt(2)))


def test_the_interval_of_the_gap_is_that_of_many_draws() -> None:
    import numpy as np

    draws = np.random.default_rng(0).normal([40, 80, 70], 3, (200_000, 3)).T
    low, high = np.quantile((draws[2] - draws[0]) / (draws[1] - draws[0]), [0.025, 0.975])
    assert verdict.gap_interval(results(a=(40, 80, 70)), "a") == pytest.approx((low, high), abs=0.02)


def test_a_run_without_results_is_judged_by_its_rollouts() -> None:
    metrics = [{"step": s, "correct/sampled": s / 100, "reverse_kl_teacher/big": 1.0} for s in range(50)]
    text, look, remarks = said(None, metrics)
    assert text == ("was distilled from big and gives 44 % right answers in training, after 4 % in its first steps ()")
    assert look == "the steps that are missing"
    assert remarks == ["50 of 100 steps are done: the run goes on, or was stopped."]
    assert said(None, [])[0] == "was trained with the objective grpo and None ()"


def test_what_went_wrong_in_training_is_named() -> None:
    metrics = [
        {
            "step": step + (step > 50),
            "truncated": 0.2,
            "share/unknown": 0.02,
            "share/absent": 0.03,
            "skipped_updates": float(step == 3),
            "replaced/charts": 4.0,
            "accuracy/charts": 0.9 if step < 60 else 0.3,
            "accuracy/sums": 0.5 + step / 200,
        }
        for step in range(100)
    ]
    assert said(results(Charts=(40, 80, 70)), metrics)[2] == [
        "1 step has no metrics.",
        "20.0 % of the responses end at rollout.max_tokens and are cut, in the last 10 steps.",
        "2.0 % of the responses could not be judged, in the last 10 steps.",
        "3.0 % of the responses have no teacher's score, in the last 10 steps.",
        "Updates skipped, because loss or gradient was not finite: 1 (`mmopd replay`).",
        "Charts: rows that could not be used and were replaced: 4.",
        "Charts: the accuracy in training fell from 90 % to 30 %.",
    ]


def test_a_task_has_one_name_and_one_colour_everywhere() -> None:
    rows = [{"step": 0, "accuracy/additions": 0.1, "accuracy/digit_sum": 0.2, "visual_advantage/digit_sum": 0.3}]
    tasks = Tasks(tasks_of(rows), ["Additions", "Digit sums", "MMStar"])
    shown = {chart["title"]: {s["name"]: s["colour"] for s in chart["series"]} for chart in curves(rows, tasks)}
    assert shown == {
        "Accuracy of the rollouts": {"Additions": "t1", "Digit sums": "t2"},
        "Visual advantage": {"Digit sums": "t2"},
    }
    assert (tasks.name("digit_sum"), tasks.colour("digit_sum"), tasks.colour("MMStar")) == ("Digit sums", "t2", None)


def test_tasks_that_differ_only_by_a_plural_keep_their_own_names_and_colours() -> None:
    tasks = Tasks(["chart", "charts", "clock"], ["Charts", "clock"])
    assert [tasks.name(t) for t in ("chart", "charts", "Charts", "clock")] == ["chart", "charts", "Charts", "clock"]
    assert [tasks.colour(t) for t in ("chart", "charts", "Charts", "clock")] == ["t1", "t2", None, "t3"]


def test_the_ninth_task_differs_from_the_first_by_its_dashes() -> None:
    tasks = Tasks([f"task {i}" for i in range(9)])
    assert (tasks.colour("task 0"), tasks.dash("task 0")) == ("t1", "solid")
    assert (tasks.colour("task 8"), tasks.dash("task 8")) == ("t1", "dot")


KL = {"reverse_kl": 0.3, "reverse_kl/charts": 0.2, "reverse_kl/sums": 0.5}


@pytest.mark.parametrize(
    ("by_teacher", "panels"),
    [
        ({"a": 0.2, "b": 0.5}, {"Reverse KL": ["all tasks", "charts (a)", "sums (b)"]}),
        ({"a": 0.5, "b": 0.2}, {"Reverse KL": ["all tasks", "charts (b)", "sums (a)"]}),
        (
            {"a": 0.2, "b": 0.4},
            {"Reverse KL": ["all tasks", "charts", "sums"], "Reverse KL by teacher": ["a", "b"]},
        ),
    ],
)
def test_reverse_kl_by_teacher_is_not_drawn_again_where_each_task_has_its_own(
    by_teacher: dict[str, float], panels: dict[str, list[str]]
) -> None:
    rows = [{"step": s} | KL | {f"reverse_kl_teacher/{t}": kl for t, kl in by_teacher.items()} for s in range(3)]
    assert {chart["title"]: [s["name"] for s in chart["series"]] for chart in curves(rows)} == panels


def test_a_run_of_one_task_has_its_reverse_kl_once() -> None:
    rows = [{"step": 0, "reverse_kl": 0.2, "reverse_kl/charts": 0.2, "reverse_kl_teacher/a": 0.2}]
    assert [[s["name"] for s in chart["series"]] for chart in curves(rows)] == [["charts (a)"]]


def test_cut_and_unknown_answers_are_drawn_even_if_there_are_none() -> None:
    [chart] = curves([{"step": s, "truncated": 0.0, "share/unknown": 0.0, "share/absent": 0.0} for s in range(3)])
    assert [s["name"] for s in chart["series"]] == ["cut", "unknown", "without a score"]


def test_a_long_run_is_thinned_to_its_last_step() -> None:
    rows = [{"step": s} for s in range(12_345)]
    steps = [row["step"] for row in thinned(rows)]
    assert (steps[0], steps[-1]) == (0, 12_344)
    assert len(steps) <= POINTS + 1


def test_every_chart_explains_itself_and_shows_metrics_that_exist() -> None:
    assert all(chart.meaning for chart in CHARTS)
    names = [name for chart in CHARTS for name in chart.names]
    assert [name for name in names if not documented(name) and name not in METRICS] == []
    assert len(names) == len(set(names))


def test_the_end_of_training_says_rate_cut_and_unknown() -> None:
    rows = [{"step": s, "lr": 3e-6, "truncated": 0.125, "share/unknown": 0.01, "skipped_updates": 1.0} for s in (0, 1)]
    assert {fact["term"]: fact["value"] for fact in at_the_end(rows)} == {
        "Cut answers": "12.5 %",
        "Unknown": "1.0 %",
        "Learning rate": "3e-06",
        "Skipped updates": "2",
    }
    assert facts({}, rows) == []


def test_prepare_does_not_squeeze_the_other_stages() -> None:
    bars = {s["name"]: (s["begin"], s["width"]) for s in stages({"prepare": 900.0, "serve": 25.0, "distil": 75.0})}
    assert bars == {"prepare": (None, None), "serve": (0.0, 25.0), "distil": (25.0, 75.0)}
