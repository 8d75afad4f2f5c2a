"""`report.html`: one self-contained page about a run, readable without a network.

Parts that a run has not written yet are left out, so that the page can be made at any time. Parts that cannot be read
are left out, too, and the page names them (`run_files`). The page has a bounded size, however long the run and its
responses are.
"""

import functools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mmopd.errors import UserError
from mmopd.evaluate.score import BenchmarkScore
from mmopd.evaluate.table import GAP_CLOSED, NO_GAP, Results, further
from mmopd.report import heatmap, verdict
from mmopd.report.charts import POINTS, Tasks, Z, curves, held_out_curves, tasks_of
from mmopd.report.facts import at_the_end, facts, value_of
from mmopd.report.loggers.state import states
from mmopd.report.run_files import Metrics, RunFiles, short
from mmopd.runtime.run_folder import RunFolder

PAGE_TOKENS = 20_000  # of all responses on the page; a browser draws them in a second or two
RESPONSE_TOKENS = 1_000  # of one response
VISIBLE_TOKENS = 300  # first tokens of a response that are shown at once
PAGE_IMAGES = 12_000_000  # characters of all images on the page
RESPONSE_IMAGES = 4
PROMPT_LIMIT = 4_000  # characters
RECIPE_LIMIT = 50_000  # characters
COUNTS = 8  # steps of a task for which the recorded responses are counted; of more, the first and last two
TASKS = 16  # for which they are counted
SOURCES = 24  # histograms of difficulty
PREPARE = "prepare"  # the stage that is made once, and reused by later runs


def write_report(run: Path) -> Path:
    """Write `report.html` of a run folder, finished or not; return its path.

    Raises:
        UserError: `run` is not a run folder, or the page cannot be written.
    """
    files = RunFiles(RunFolder(run))
    if not files.there():
        raise UserError(f"{run}: not a run folder: it has neither recipe.yaml nor metrics.jsonl")
    page = template("report.html.j2").render(**_parts(files, run.resolve().name))
    path = files.run.report
    try:
        path.write_bytes(page.encode("utf-8", "replace"))  # a lone surrogate from a damaged file becomes "?"
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written: {error.strerror}") from None
    return path


def _parts(files: RunFiles, name: str) -> dict[str, Any]:
    """Return the variables of the template."""
    recipe_text, recipe = files.recipe()
    versions, stage_times, metrics, results = files.versions(), files.stages(), files.metrics(), files.results()
    measured = files.difficulty()
    responses = files.responses(RESPONSE_TOKENS)
    tasks = Tasks(
        [*tasks_of(metrics), *(r.row.task for r in responses)], results.columns if results is not None else ()
    )
    samples = samples_view(files, responses, tasks)
    steps = value_of(recipe, "train.steps", int)
    changes = files.teacher_changes()
    remarks = verdict.remarks(results, metrics, steps, len(files.left_out), tasks) + verdict.of_teachers(changes)
    charts = curves(metrics, tasks)
    charts[1:1] = held_out_curves(files.held_out(), tasks)
    marks = sorted({one.step for one in changes})
    data: dict[str, Any] = {"curves": charts, "difficulty": difficulty(measured, tasks), "marks": marks}
    return {
        "name": name,
        "verdict": sentence(recipe, results, metrics, tasks, remarks),
        "marks": marks,
        "remarks": [remark for remark in remarks if remark.text],
        "facts": facts(recipe, metrics),
        "end": at_the_end(metrics),
        "end_steps": min(verdict.LAST, len(metrics)),
        "recipe_text": short(recipe_text, RECIPE_LIMIT),
        "versions": versions,
        "steps": len(metrics),
        "thinned": len(metrics) > POINTS,
        "results": results_view(results, tasks),
        "no_gap": NO_GAP,
        "stages": stages(stage_times),
        "loggers": {name: now for name, now in states(files.run.root).items() if now.failed},
        "samples": samples,
        "full_colour": heatmap.FULL_COLOUR,
        "has_curves": bool(data["curves"]),
        "has_difficulty": bool(data["difficulty"]),
        "sources": len(measured),
        "data_sources": len(data["difficulty"]),
        "left_out": list(files.left_out),
        "missing": files.left_out.missing,
        "data": script_json(data),
        "css": resource("report.css"),
        "js": resource("page.js") + resource("report.js"),
        "plotly": plotly(),
    }


def sentence(
    recipe: Mapping[str, Any],
    results: Results | None,
    metrics: Metrics,
    tasks: Tasks,
    remarks: Sequence[verdict.Remark],
) -> dict[str, Any]:
    """Return the verdict for the template: what was distilled, what was gained, and what to look at first."""
    look = remarks[0] if remarks else verdict.nearest(results, tasks) if results is not None else None
    student = value_of(recipe, "student.model", str) or "The student"
    objective = value_of(recipe, "algorithm.objective.kind", str) or "opd"
    return verdict.sentence(results, metrics, tasks, student=student, objective=objective, look=look)


def difficulty(measured: Mapping[str, Any], tasks: Tasks) -> list[dict[str, Any]]:
    """Return the histogram of each source before and after balancing, as shares of its prompts."""
    found = {name: one for name, one in measured.items() if any(one.attempts)}
    if not found:
        return []
    from mmopd.prompts.difficulty_counts import histogram  # loads torch, which a page without this part does not need

    shown = []
    for name, one in list(found.items())[:SOURCES]:
        before, after = histogram(one)
        shown.append(
            {
                "source": tasks.name(name),
                "colour": tasks.colour(name),
                "shape": one.shape,
                "rows": len(one.correct),
                "largest": max(one.weights),
                "before": (before / before.sum()).round(5).tolist(),
                "after": (after / (after.sum() or 1.0)).round(5).tolist(),
            }
        )
    return shown


def results_view(results: Results | None, tasks: Tasks) -> dict[str, Any] | None:
    """Return the results for the page: a table, and for each benchmark the models on a line from 0 to 100."""
    if results is None:
        return None
    return {
        "columns": [_column(results, column, tasks) for column in results.columns],
        "rows": [
            {"name": row.name, "kind": row.kind, "cells": [_cell(row.record(c)) for c in results.columns]}
            for row in results.rows
        ],
        "tracks": [_track(results, column) for column in results.columns],
        "gap_closed": GAP_CLOSED,
        "failures": [{"endpoint": r.endpoint, "column": r.column, "reason": short(r.reason, 500)}
                     for r in results.failures()],
    }  # fmt: skip


def stages(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return each stage with its time and its share of the total, in order of time.

    `prepare` has no share: it is made once, and would squeeze the other stages.
    """
    total = sum(time for name, time in seconds.items() if name != PREPARE) or 1.0
    begin = 0.0
    shown = []
    for name, time in seconds.items():
        if name == PREPARE:
            shown.append({"name": name, "seconds": time, "begin": None, "width": None})
            continue
        shown.append({"name": name, "seconds": time, "begin": 100 * begin / total, "width": 100 * time / total})
        begin += time
    return shown


def samples_view(files: RunFiles, responses: Sequence[heatmap.Response], tasks: Tasks) -> dict[str, Any]:
    """Return the responses of the page: those to show first, and the others until the page is full."""
    first, others = heatmap.choose(responses)
    left = {"tokens": PAGE_TOKENS, "images": PAGE_IMAGES}
    shown: list[list[dict[str, Any]]] = [[], []]
    for place, response in [*((0, r) for r in first), *((1, r) for r in others)]:
        left["tokens"] -= len(response.row.tokens)
        if left["tokens"] < 0:
            break
        shown[place].append(response_view(files, response, tasks, left))
    return {
        "first": shown[0],
        "more": shown[1],
        "recorded": len(responses),
        "visual": any(sample["visual"] is not None for sample in shown[0] + shown[1]),
        "counts": _counts(responses, tasks),
    }


def script_json(data: object) -> Markup:
    """Return JSON that is safe inside a <script> element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def response_view(files: RunFiles, response: heatmap.Response, tasks: Tasks, left: dict[str, int]) -> dict[str, Any]:
    """Return a response for the template; its images are taken from the characters that are `left`."""
    row = response.row
    cells = list(heatmap.cells(row))
    long = len(cells) > VISIBLE_TOKENS + heatmap.TAIL
    pictures, problems = pictures_of(files.images(response), left, RESPONSE_IMAGES)
    for problem in problems:
        if problem.startswith("an image"):
            files.left_out.add(response.file.name, f"step {row.step}, {row.task}: {problem}")
    return {
        "row": row,
        "prompt": short(row.prompt, PROMPT_LIMIT),
        "answer": short(row.answer, PROMPT_LIMIT // 4),
        "reason": short(row.reason),
        "task": short(tasks.name(row.task)),
        "teacher": short(row.teacher_name),
        "colour": tasks.colour(row.task),
        "pictures": pictures,
        "pictures_problem": problems[-1] if problems else "",
        "cells": cells[:VISIBLE_TOKENS] if long else cells,
        "middle": cells[VISIBLE_TOKENS : -heatmap.TAIL] if long else [],
        "gap": response.tokens - len(cells),
        "tail": cells[-heatmap.TAIL :] if long else [],
        "tokens": response.tokens,
        "reward": response.reward,
        "advantage": response.advantage,
        "visual": response.visual,
    }


def pictures_of(encoded: Sequence[str], left: dict[str, int], limit: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Return some images for a template, and what is not shown and why.

    Args:
        encoded: images in base64.
        left: room on the page; the characters of the images are taken from `images`.
        limit: how many are shown.
    """
    pictures: list[dict[str, Any]] = []
    problems = [f"{len(encoded) - limit} more are not shown"] if len(encoded) > limit else []
    for image in encoded[:limit]:
        try:
            url, width, height = heatmap.picture(image)
        except ValueError as error:
            problems.append(f"an image {short(str(error))}")
            continue
        left["images"] -= len(url)
        if left["images"] < 0:
            problems.append("images are left out, because the page is full")
            break
        pictures.append({"url": url, "width": width, "height": height})
    return pictures, problems


def _counts(responses: Sequence[heatmap.Response], tasks: Tasks) -> list[dict[str, Any]]:
    """Return how many responses of each task and step were recorded, by verdict."""
    found: dict[str, dict[int, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for response in responses:
        found[response.row.task][response.row.step][response.row.verdict] += 1
    return [
        {
            "task": tasks.name(task),
            "colour": tasks.colour(task),
            "steps": [
                f"step {step}: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(steps[step].items()))
                for step in (sorted(steps) if len(steps) <= COUNTS else [*sorted(steps)[:2], *sorted(steps)[-2:]])
            ],
        }
        for task, steps in sorted(found.items())[:TASKS]
    ]


def _column(results: Results, column: str, tasks: Tasks) -> dict[str, Any]:
    numbers = {r.n for row in results.rows if (r := row.record(column)) is not None and r.n}
    n = f"{min(numbers):,}" if len(numbers) == 1 else f"{min(numbers):,} to {max(numbers):,}" if numbers else ""
    return {"name": tasks.name(column), "colour": tasks.colour(column), "n": n}


def _cell(record: BenchmarkScore | None) -> dict[str, Any]:
    if record is None:
        return {"text": "–", "stderr": None, "failed": False, "title": "not measured"}
    title = f"{record.task}, {record.metric}" + (f", n = {record.n}" if record.n else "")
    title += f"; {more}" if (more := further(record)) else ""
    if record.score is None:
        return {"text": "failed", "stderr": None, "failed": True, "title": short(record.reason, 500)}
    return {"text": f"{record.score:.1f}", "stderr": record.stderr, "failed": False, "title": title}


def _track(results: Results, column: str) -> dict[str, Any]:
    """Return the models on a line from 0 to 100, with their intervals, and the share of the gap that was closed."""
    marks = []
    for row in results.rows:
        record = row.record(column)
        if record is None or record.score is None:
            continue
        error = verdict.stderr(record)
        ends = (record.score, record.score) if error is None else (
            max(0.0, record.score - Z * error), min(100.0, record.score + Z * error))  # fmt: skip
        marks.append({"name": row.name, "kind": row.kind, "score": record.score, "low": ends[0], "high": ends[1]})
    ends_of = {mark["kind"]: mark["score"] for mark in marks}
    segment = (ends_of["base"], ends_of["distilled"]) if {"base", "distilled"} <= ends_of.keys() else None
    gain = verdict.gain(results, column)
    return {
        "marks": marks,
        "gap": results.gap_closed(column),
        "gap_interval": verdict.gap_interval(results, column),
        "gain": gain.text if gain else "",
        "segment": segment,
        "measured": {"base", "teacher", "distilled"} <= ends_of.keys(),
    }


@functools.cache
def environment(*packages: str) -> Environment:
    """Return what renders the templates of this package, and of others that include its parts."""
    found = Environment(
        loader=ChoiceLoader([PackageLoader(package, ".") for package in (*packages, "mmopd.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["number"] = _signed
    found.filters["percent"] = lambda share: f"{100 * share:.0f} %".replace("-", "−")
    found.filters["duration"] = duration
    found.globals["factor"] = math.exp(heatmap.FULL_COLOUR)
    return found


def template(name: str) -> Any:
    """Return a template of this package; it escapes what it is given."""
    return environment().get_template(name)


def duration(seconds: float) -> str:
    """Return a time in hours, minutes or seconds."""
    if seconds >= 3600:
        return f"{seconds // 3600:,.0f} h {seconds % 3600 // 60:.0f} min"
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s" if seconds >= 100 else f"{seconds:.1f} s"


def _signed(value: float, digits: int = 3) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


@functools.cache
def resource(name: str, package: str = "mmopd.report") -> Markup:
    """Return a file of a package as it is."""
    return Markup(resources.files(package).joinpath(name).read_text(encoding="utf-8"))


@functools.cache
def plotly() -> Markup:
    """Return the installed package's JavaScript of the charts."""
    return Markup(resources.files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8"))
