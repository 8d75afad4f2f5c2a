"""The charts of the report: which metrics they show, under which names and in which colours."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

Z = 1.96  # standard errors of an interval of 95 %
POINTS = 1000  # values of a line; of more steps, one of k and the last are drawn
LINES = 16  # in a chart
TASK_COLOURS = 8  # of report.css, --t1 to --t8
OTHER_COLOURS = 6  # --o1 to --o6: all that is no task
DASHES = ("solid", "dot", "dash", "dashdot")  # of tasks that share a colour
NOT_ALNUM = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of the training curves: the metrics that match `names`, against the step."""

    title: str
    unit: str
    names: tuple[str, ...]
    meaning: str  # for a reader who does not know the word
    stacked: bool = False
    log: bool = False
    share: bool = False  # 0 to 1
    band: bool = False  # `names` are medians (p50), drawn inside the band from p10 to p90
    tasks: bool = False  # the names after the slash are tasks
    zeros: bool = True  # lines of zeros are shown; otherwise only if all lines are zeros
    exact: bool = False  # not smoothed


CHARTS = (
    Chart(
        "Accuracy of the rollouts",
        "share right, by task",
        ("accuracy/*",),
        "A rollout is a response that the student samples in training. The share is of the responses that the "
        "verifier of the task can judge.",
        share=True,
        tasks=True,
    ),
    Chart(
        "Reverse KL",
        "student minus teacher, nats per token",
        ("reverse_kl", "reverse_kl/*"),
        "How far the student is from its teacher on the student's own responses: the mean of log π_student − log "
        "π_teacher over tokens. 0: both give the tokens the same probability. A nat is a factor of e = 2.7.",
        tasks=True,
    ),
    Chart(
        "Reverse KL by teacher",
        "student minus teacher, nats per token",
        ("reverse_kl_teacher/*",),
        "The same, over the responses that each teacher scored.",
    ),
    Chart(
        "Right responses",
        "share of the judged, as sampled and in the loss",
        ("correct/*",),
        "Sampled: all responses. Kept: those in the loss, after the online balance and the mask have left some out.",
        share=True,
    ),
    Chart(
        "Return",
        "teacher minus student, nats per token",
        ("return", "return/*"),
        "The mean over tokens of log π_teacher − log π_student of a response. The distillation is to give right "
        "responses a higher return than wrong ones.",
    ),
    Chart(
        "Cut, unknown, without a score",
        "share of the responses",
        ("truncated", "share/unknown", "share/absent"),
        "Cut: the response ended at rollout.max_tokens. Unknown: the verifier could not judge it. Without a score: no "
        "teacher scored it, so that it is left out of the loss.",
        share=True,
    ),
    Chart(
        "Where responses went",
        "share of the responses",
        ("share/kept", "share/balanced_away", "share/masked"),
        "Kept: in the loss. Balanced away: left out, so that right and wrong responses are as many as "
        "algorithm.balance says. Masked: left out by algorithm.margin.",
        share=True,
        zeros=False,
    ),
    Chart(
        "Response length",
        "tokens",
        ("response_length",),
        "The mean number of tokens of a response, its end token included.",
    ),
    Chart(
        "Entropy, estimated",
        "mean −log π of the sampled tokens, nats",
        ("entropy_estimate",),
        "How undecided the student is. Near 0 it gives nearly all probability to one token, and its responses to a "
        "prompt are nearly the same.",
    ),
    Chart(
        "Order consistency",
        "share of two-sided groups with a margin ≥ 0",
        ("order_consistency/*",),
        "A two-sided group is the responses to a prompt, with right and wrong ones among them. Its margin is the "
        "smallest or mean return of the right ones minus that of the wrong ones. Before and after algorithm.margin.",
        share=True,
    ),
    Chart(
        "Margin reached",
        "share of two-sided groups with a margin ≥ δ",
        ("order_delta/*",),
        "δ is algorithm.margin.delta, the margin that the calibration is to reach.",
        share=True,
    ),
    Chart(
        "Margins",
        "median and middle 80 % of two-sided groups, nats",
        ("margin/p50_before", "margin/p50_after"),
        "Return of the right responses to a prompt minus that of the wrong ones, before and after algorithm.margin.",
        band=True,
    ),
    Chart(
        "Shift",
        "mean size over the kept responses, nats per token",
        ("shift",),
        "How much algorithm.margin changes the reward of a token.",
    ),
    Chart(
        "Visual advantage",
        "teacher with minus without the image, nats per token",
        ("visual_advantage/*",),
        "How much likelier the teacher finds the response when it sees the image. Near 0 the image does not matter to "
        "the teacher's scores.",
        tasks=True,
    ),
    Chart(
        "Learning rate",
        "of the optimiser",
        ("lr",),
        "The size of an update: train.lr with its warmup and schedule.",
        exact=True,
    ),
    Chart(
        "Loss",
        "of the objective",
        ("loss",),
        "What the optimiser lowers. It depends on which responses are in a step, and need not fall as the student "
        "learns.",
    ),
    Chart(
        "Gradient norm",
        "before clipping",
        ("grad_norm",),
        "Size of the gradient of an update. A larger one than train.grad_clip is scaled down to it.",
    ),
    Chart(
        "Engine against trainer",
        "|log-prob difference|, nats",
        ("probe", "mismatch"),
        "The server that samples and the trainer compute the same model. Probe: the largest difference after the "
        "weights were sent. Mismatch: the largest of a trained token, before its update.",
        log=True,
    ),
    Chart(
        "Scoring",
        "requests a step",
        ("scoring/requests", "scoring/reused", "scoring/hedged"),
        "Requests to teachers. Reused: scores that needed no request, because the same was asked before. Hedged: sent "
        "again to another server, because the first was late.",
        zeros=False,
    ),
    Chart(
        "Scoring faults",
        "failed requests a step",
        ("scoring/failed/*", "absent_blind"),
        "Requests that failed, by cause; another server may have answered. absent_blind: responses without one of the "
        "two scores with and without the image.",
        zeros=False,
    ),
    Chart(
        "Time of a step",
        "seconds",
        ("seconds/*",),
        "Rollout: the student samples and teachers score. Update: the optimiser. Sync: the new weights are sent to the "
        "student's server.",
        stacked=True,
    ),
)
NAMES = {
    "return": "all",
    "reverse_kl": "all tasks",
    "truncated": "cut",
    "share/absent": "without a score",
    "share/balanced_away": "balanced away",
    "absent_blind": "with or without image",
}
COLOURS = {
    "return/right": "good",
    "return/wrong": "bad",
    "return": "ink",
    "reverse_kl": "ink",
    **{f"{name}{when}": c for name in ("order_consistency/", "order_delta/", "margin/p50_")
       for when, c in (("before", "o2"), ("after", "o1"))},
}  # fmt: skip


class Tasks:
    """One name and one colour for each task.

    A benchmark whose name is the task's but for case, blanks and a plural s (`Digit sums`, `digit_sum`) gives the task
    its name; a source of that name has the task's colour, too.
    """

    def __init__(self, tasks: Iterable[str], benchmarks: Iterable[str] = ()) -> None:
        self._places = {task: i for i, task in enumerate(dict.fromkeys(tasks))}
        alike = Counter(map(_plain, self._places))
        self._by_plain = {_plain(task): task for task in self._places if alike[_plain(task)] == 1}
        self._names = {task: task for task in self._places}
        for benchmark in benchmarks:
            if (task := self._task(benchmark)) is not None and self._names[task] == task:
                self._names[task] = benchmark

    def name(self, name: str) -> str:
        """Return the name of a task, or of a benchmark or source that has the task's name."""
        task = self._task(name)
        return name if task is None else self._names[task]

    def colour(self, name: str) -> str | None:
        """Return the CSS variable of the task's colour, without dashes; None if it is no task's name."""
        task = self._task(name)
        return None if task is None else f"t{self._places[task] % TASK_COLOURS + 1}"

    def dash(self, name: str) -> str:
        """Return how the task's lines are drawn; only tasks beyond the eighth are not solid."""
        task = self._task(name)
        return DASHES[0 if task is None else self._places[task] // TASK_COLOURS % len(DASHES)]

    def _task(self, name: str) -> str | None:
        return name if name in self._places else self._by_plain.get(_plain(name))


def tasks_of(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the tasks that the metrics name."""
    patterns = [name for chart in CHARTS if chart.tasks for name in chart.names if name.endswith("/*")]
    found = (n for row in metrics for n in row if any(fnmatchcase(n, pattern) for pattern in patterns))
    return list(dict.fromkeys(name.partition("/")[2] for name in found))


def curves(metrics: Sequence[Mapping[str, Any]], tasks: Tasks | None = None) -> list[dict[str, Any]]:
    """Return the charts for which there are values, with their series.

    A chart that would repeat the lines of another is left out: reverse KL by teacher, if each task has its own.
    """
    tasks = tasks or Tasks(tasks_of(metrics))
    metrics = thinned(metrics)
    there = list(dict.fromkeys(name for row in metrics for name in row))
    charts: list[dict[str, Any]] = []
    drawn: dict[tuple[Any, ...], dict[str, Any]] = {}
    for chart in CHARTS:
        names = dict.fromkeys(n for pattern in chart.names for n in there if fnmatchcase(n, pattern))
        series = [_series(chart, metrics, name, i, tasks) for i, name in enumerate(names)]
        series = [s for s in series if any(y is not None for y in s["y"])]
        series = series if chart.zeros else [s for s in series if any(s["y"])] or series[:1]
        again = [drawn.get(tuple(s["y"])) for s in series]
        if chart.title == "Reverse KL by teacher" and series and all(again):
            for mine, theirs in zip(series, again, strict=True):
                assert theirs is not None
                theirs["name"] += f" ({mine['name']})"
            continue
        if chart.title == "Reverse KL":
            drawn = {tuple(s["y"]): s for s in series}
            series = list({tuple(s["y"]): s for s in series}.values())  # one task: "all tasks" is the same line
        if series:
            more = f"; {LINES} of {len(series)} lines" if len(series) > LINES else ""
            charts.append(
                {
                    "title": chart.title,
                    "unit": chart.unit + more,
                    "meaning": chart.meaning,
                    "stacked": chart.stacked,
                    "log": chart.log,
                    "share": chart.share,
                    "band": chart.band,
                    "legend": chart.tasks or len(chart.names) > 1,
                    "exact": chart.exact,
                    "x": [row["step"] for row in metrics],
                    "series": series[:LINES],
                }
            )
    return charts


def held_out_curves(rows: Sequence[Mapping[str, Any]], tasks: Tasks) -> list[dict[str, Any]]:
    """Return the charts of the evaluations between steps, with intervals of 95 %; none without evaluations."""
    rows = thinned(rows)
    rest = "The step counts the updates so far. The interval is 1.96 standard errors of the mean over"
    return [
        *_with_intervals(
            rows,
            ("held_out", 1.0),
            tasks,
            title="Held-out rows",
            unit="share right, with an interval of 95 %",
            meaning="The student answers the rows of evaluate.mixture between steps, which it does not train on. "
            f"{rest} rows.",
        ),
        *_with_intervals(
            rows,
            ("suite", 100.0),
            tasks,
            title="Benchmarks between steps",
            unit="share of the best score, with an interval of 95 %",
            meaning=f"The student answers the benchmarks of evaluate.suite between steps. {rest} questions; there is "
            "none if the benchmark has no standard error.",
        ),
    ]


def _with_intervals(
    rows: Sequence[Mapping[str, Any]], scores: tuple[str, float], tasks: Tasks, **words: str
) -> list[dict[str, Any]]:
    """Return the chart of scores with their standard errors; none if no row has one.

    Args:
        scores: the first part of their names, and the best score.
        words: title, unit and meaning.
    """
    kind, best = scores
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name.startswith(f"{kind}/")]
    series = []
    for i, name in enumerate(names[:LINES]):
        source = name.partition("/")[2]
        shares = [None if row.get(name) is None else row[name] / best for row in rows]
        widths = [Z * (row.get(f"{kind}_error/{source}") or 0.0) / best for row in rows]
        both = list(zip(shares, widths, strict=True))
        series.append(
            {
                "metric": name,
                "name": tasks.name(source),
                "colour": tasks.colour(source) or f"o{i % OTHER_COLOURS + 1}",
                "dash": tasks.dash(source),
                "y": shares,
                "low": [None if y is None else max(0.0, y - width) for y, width in both],
                "high": [None if y is None else min(1.0, y + width) for y, width in both],
            }
        )
    if not series:
        return []
    chart = words | {"x": [row["step"] for row in rows], "series": series}
    return [
        chart | dict.fromkeys(("share", "band", "legend", "exact"), True) | dict.fromkeys(("stacked", "log"), False)
    ]


def thinned(metrics: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return at most about `POINTS` rows, evenly spaced, the last among them."""
    every = math.ceil(len(metrics) / POINTS)
    if every <= 1:
        return metrics
    return [row for i, row in enumerate(metrics) if i % every == 0 or i == len(metrics) - 1]


def steps_missing(metrics: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of steps between the first and the last that have no row."""
    return sum(int(b["step"] - a["step"]) - 1 for a, b in pairwise(metrics))


def _series(chart: Chart, metrics: Sequence[Mapping[str, Any]], name: str, place: int, tasks: Tasks) -> dict[str, Any]:
    after = name.partition("/")[2]
    of_task = chart.tasks and bool(after)
    colour = tasks.colour(after) if of_task else COLOURS.get(name)
    shown = {
        "metric": name,
        "name": tasks.name(after) if of_task else NAMES.get(name, after or name),
        "colour": colour or f"o{place % OTHER_COLOURS + 1}",
        "dash": tasks.dash(after) if of_task else "solid",
        "y": [row.get(name) for row in metrics],
    }
    if chart.band:
        low, high = ([row.get(name.replace("p50", p)) for row in metrics] for p in ("p10", "p90"))
        shown |= {"name": name.rpartition("p50_")[2], "low": low, "high": high}
    return shown


def _plain(name: str) -> str:
    return NOT_ALNUM.sub("", name.casefold()).removesuffix("s")
