"""The verdict of a run: what was distilled from whom, what it gained, and what to look at.

Intervals are of 95 % (1.96 standard errors) over the questions of the benchmarks. Base and distilled are treated as
independent, although they answer the same questions, so that the intervals of a gain are rather too wide than too
narrow. They say nothing about other seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mmopd.evaluate.score import BenchmarkScore
from mmopd.evaluate.table import NO_GAP, Kind, Results
from mmopd.report.charts import Tasks, Z, steps_missing
from mmopd.report.run_files import TeacherChange, short

LAST = 10  # steps at the end over which means are taken
CUT = 0.05  # larger shares of cut responses are named
UNKNOWN = 0.01  # larger shares of unknown outcomes and of responses without a score are named
FELL = 0.1  # drops of an accuracy below its best by more are named
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Gain:
    """A difference in points, with half its interval; `half` is None if an error is not known."""

    points: float
    half: float | None

    @property
    def text(self) -> str:
        """The gain with its interval."""
        return signed(self.points) + (f" ({self.interval})" if self.half is not None else "")

    @property
    def interval(self) -> str:
        """The interval in words; empty if it is not known."""
        if self.half is None:
            return ""
        return f"95 % interval {signed(self.points - self.half)} to {signed(self.points + self.half)}"


@dataclass(frozen=True, slots=True)
class Remark:
    """Something to look at; `short` completes "look first at ..."."""

    short: str
    text: str
    where: str  # id of the section that shows it


def best(results: Results, kind: Kind, column: str) -> tuple[str, BenchmarkScore] | None:
    """Return name and record of the best model of a kind on a benchmark; None if none has a score."""
    found = [(row.name, r) for row in results.rows if row.kind == kind and (r := row.record(column)) is not None]
    return max(((n, r) for n, r in found if r.score is not None), key=lambda one: one[1].score or 0.0, default=None)


def stderr(record: BenchmarkScore) -> float | None:
    """Return the standard error; where it is 0 because all answers are right or wrong, the rule of three instead."""
    if record.stderr == 0 and record.n:
        return 100 * 3 / record.n / Z  # the interval of 95 % ends at 3 / n
    return record.stderr


def gain(results: Results, column: str) -> Gain | None:
    """Return distilled minus base on a benchmark."""
    base, distilled = best(results, "base", column), best(results, "distilled", column)
    if base is None or distilled is None:
        return None
    assert base[1].score is not None
    assert distilled[1].score is not None
    errors = [stderr(base[1]), stderr(distilled[1])]
    known = [e for e in errors if e is not None]
    return Gain(distilled[1].score - base[1].score, Z * math.hypot(*known) if len(known) == 2 else None)


def mean_gain(gains: Sequence[Gain]) -> Gain:
    """Return the mean of the gains of several benchmarks."""
    halves = [g.half for g in gains if g.half is not None]
    half = math.hypot(*halves) / len(gains) if len(halves) == len(gains) else None
    return Gain(fmean(g.points for g in gains), half)


def gap_interval(results: Results, column: str) -> tuple[float, float] | None:
    """Return the interval of `Results.gap_closed`, by the delta method; None if an error is not known."""
    gap = results.gap_closed(column)
    found = [best(results, kind, column) for kind in ("base", "teacher", "distilled")]
    records = [one[1] for one in found if one is not None]
    errors = [e for r in records if (e := stderr(r)) is not None]
    if gap is None or len(errors) < 3:
        return None
    base, teacher, _ = (r.score or 0.0 for r in records)
    slopes = ((gap - 1) / (teacher - base), -gap / (teacher - base), 1 / (teacher - base))
    half = Z * math.hypot(*(slope * error for slope, error in zip(slopes, errors, strict=True)))
    return gap - half, gap + half


def sentence(
    results: Results | None, metrics: Rows, tasks: Tasks, *, student: str, objective: str, look: Remark | None
) -> dict[str, Any]:
    """Return the verdict in parts: `what`, `gained` (None before anything is measured), `interval` and `look`."""
    teachers = [row.name for row in results.rows if row.kind == "teacher"] if results else []
    if not teachers:
        teachers = sorted({n.partition("/")[2] for row in metrics for n in row if n.startswith("reverse_kl_teacher/")})
    how = f"was distilled from {listed(teachers)}" if teachers else f"was trained with the objective {objective}"
    verdict: dict[str, Any] = {"student": student, "what": how, "interval": "", "gained": None, "look": look}
    gains = {c: g for c in (results.columns if results else ()) if results and (g := gain(results, c))}
    if gains:
        mean = mean_gain(list(gains.values()))
        word = "gained" if mean.points >= 0 else "lost"
        columns = len(results.columns) if results else 0
        part = f"{len(gains)} of {columns} benchmarks" if len(gains) < columns else f"{columns} benchmarks"
        only = tasks.name(next(iter(gains))) + (f", {part}" if columns > 1 else "")
        average = f"average over {part}" if len(gains) > 1 else only
        verdict |= {"gained": f"{word} {abs(mean.points):.1f} points on {average}", "interval": mean.interval}
    elif accuracy := _means(metrics, "correct/sampled"):
        first, last = accuracy
        text = f"gives {last:.0%} right answers in training, after {first:.0%} in its first steps"
        verdict["gained"] = text.replace("%", " %")
    return verdict


def remarks(results: Results | None, metrics: Rows, steps: int | None, left_out: int, tasks: Tasks) -> list[Remark]:
    """Return what a reader should look at, the most important first.

    Args:
        steps: number of steps that the recipe asks for, if it can be read.
        left_out: number of files of which something is left out.
    """
    found = []
    if left_out:
        files = "file that is" if left_out == 1 else f"{left_out} files that are"
        text = "Not all files of the run can be read, so that this page may be wrong: see the list."
        found.append(Remark(f"the {files} damaged", text, "left-out"))
    found += _of_results(results, tasks) if results else []
    return found + _of_training(metrics, steps, tasks)


def of_teachers(changes: Sequence[TeacherChange]) -> list[Remark]:
    """Return what to say about teachers that were changed at a resume."""
    return [
        Remark(
            "the teachers that changed",
            f"Teacher {short(one.teacher)} is another one from step {one.step:,} on: {short('; '.join(one.what))}.",
            "training",
        )
        for one in changes
    ]


def nearest(results: Results, tasks: Tasks) -> Remark | None:
    """Return the benchmark on which most of the gap is left; None if no gap is left that can be told from noise."""
    gaps = {c: gap for c in results.columns if (gap := results.gap_closed(c)) is not None and gap < 1}
    if not gaps:
        return None
    column = min(gaps, key=lambda c: gaps[c])
    teacher = best(results, "teacher", column)
    assert teacher is not None
    name = tasks.name(column)
    what = f"{name}, where {1 - gaps[column]:.0%} of the gap to {teacher[0]} is left".replace("%", " %")
    return Remark(what, "", "results")


def _of_results(results: Results, tasks: Tasks) -> list[Remark]:
    found = []
    failures = results.failures()
    if failures:
        names = listed([f"{r.endpoint} on {tasks.name(r.column)}" for r in failures])
        found.append(Remark("the benchmarks that failed", f"Without a score: {names}.", "results"))
    gains = {tasks.name(c): g for c in results.columns if (g := gain(results, c))}
    for name, one in gains.items():
        if one.half is not None and one.points + one.half < 0:
            found.append(Remark(f"{name}, which fell", f"{name} fell: {one.text}.", "results"))
    for name, one in gains.items():
        if one.half is not None and abs(one.points) <= one.half:
            text = f"{name}: the change cannot be told from noise: {one.text}."
            found.append(Remark(f"{name}, where no gain is certain", text, "results"))
    for column in results.columns:
        teacher, base = best(results, "teacher", column), best(results, "base", column)
        if teacher and base and (teacher[1].score or 0.0) - (base[1].score or 0.0) < NO_GAP:
            name = tasks.name(column)
            found.append(
                Remark(f"{name}, where no teacher leads", f"{name}: no teacher leads the base by a point.", "results")
            )
    return found


def _of_training(metrics: Rows, steps: int | None, tasks: Tasks) -> list[Remark]:
    found = []
    done = int(metrics[-1]["step"]) + 1 if metrics else 0
    if steps is not None and done < steps and metrics:
        found.append(
            Remark("the steps that are missing", f"{done:,} of {steps:,} steps are done: the run goes on, or was "
                   "stopped.", "training")
        )  # fmt: skip
    if missing := steps_missing(metrics):
        text = "1 step has no metrics." if missing == 1 else f"{missing:,} steps have no metrics."
        found.append(Remark("the gaps in the metrics", text, "training"))
    for name, limit, what, text in (
        ("truncated", CUT, "the responses that are cut", "of the responses end at rollout.max_tokens and are cut"),
        ("share/unknown", UNKNOWN, "the unknown outcomes", "of the responses could not be judged"),
        ("share/absent", UNKNOWN, "the responses without a score", "of the responses have no teacher's score"),
    ):
        means = _means(metrics, name)
        if means and means[1] > limit:
            last = f"{means[1]:.1%}".replace("%", " %")
            found.append(Remark(what, f"{last} {text}, in the last {min(LAST, len(metrics))} steps.", "training"))
    if skipped := sum(row.get("skipped_updates") or 0 for row in metrics):
        text = f"Updates skipped, because loss or gradient was not finite: {skipped:,.0f} (`mmopd replay`)."
        found.append(Remark("the updates that were skipped", text, "training"))
    for name in dict.fromkeys(n for row in metrics[-1:] for n in row if n.startswith("replaced/")):
        if number := metrics[-1].get(name):
            source = tasks.name(name.partition("/")[2])
            text = f"{source}: rows that could not be used and were replaced: {number:,.0f}."
            found.append(Remark("the rows that were replaced", text, "training"))
    return found + _drops(metrics, tasks)


def _drops(metrics: Rows, tasks: Tasks) -> list[Remark]:
    found = []
    for name in dict.fromkeys(n for row in metrics for n in row if n.startswith("accuracy/")):
        values = [v for row in metrics if (v := row.get(name)) is not None]
        if len(values) < 3 * LAST:
            continue
        width = max(LAST, len(values) // 10)  # few windows, so that the best is not the luckiest of many
        peak = max(fmean(values[i : i + width]) for i in range(0, len(values) - width + 1, width))
        last = fmean(values[-width:])
        if last < peak - FELL:
            task = tasks.name(name.partition("/")[2])
            text = f"{task}: the accuracy in training fell from {peak:.0%} to {last:.0%}.".replace("%", " %")
            found.append(Remark(f"{task}, whose accuracy fell again", text, "training"))
    return found


def _means(metrics: Rows, name: str) -> tuple[float, float] | None:
    """Return the means of a metric over the first and the last `LAST` values."""
    values = [v for row in metrics if (v := row.get(name)) is not None]
    return (fmean(values[:LAST]), fmean(values[-LAST:])) if values else None


def last_mean(metrics: Rows, name: str) -> float | None:
    """Return the mean of a metric over its last `LAST` values; None if it has none."""
    means = _means(metrics, name)
    return means[1] if means else None


def listed(names: Sequence[str], limit: int = 4) -> str:
    """Return the names as a list in a sentence; those beyond `limit` are counted."""
    shown = [*names[:limit], *([f"{len(names) - limit} more"] if len(names) > limit else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def signed(points: float) -> str:
    """Return a number with its sign and one digit."""
    return f"{points:+.1f}".replace("-", "−")
