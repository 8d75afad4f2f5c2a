"""`report.html`: one self-contained page about a run, readable without a network.

Parts that a run has not written yet are left out, so that the page can be made at any time.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mmopd.errors import UserError
from mmopd.evaluate.lmms import BenchmarkScore
from mmopd.evaluate.table import GAP_CLOSED, Results
from mmopd.report import heatmap
from mmopd.report.metrics import read_lines


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart of the training curves: the metrics that match `names`, against the step."""

    title: str
    unit: str
    names: tuple[str, ...]
    stacked: bool = False
    log: bool = False
    share: bool = False  # 0 to 1
    band: bool = False  # `names` are medians (p50), drawn inside the band from p10 to p90


CHARTS = (
    Chart("Accuracy of the rollouts", "share right, by task", ("accuracy/*",), share=True),
    Chart("Right responses", "share of the judged, as sampled and as kept", ("correct/*",), share=True),
    Chart("Return", "teacher minus student, nats per token", ("return", "return/*")),
    Chart("Reverse KL by task", "student minus teacher, nats per token", ("reverse_kl", "reverse_kl/*")),
    Chart("Reverse KL by teacher", "student minus teacher, nats per token", ("reverse_kl_teacher/*",)),
    Chart("Entropy, estimated", "mean −log π of the sampled tokens, nats", ("entropy_estimate",)),
    Chart("Response length", "tokens", ("response_length",)),
    Chart("Order consistency", "share of two-sided groups with a margin ≥ 0", ("order_consistency/*",), share=True),
    Chart("Margin reached", "share of two-sided groups with a margin ≥ δ", ("order_delta/*",), share=True),
    Chart(
        "Margins",
        "median and middle 80 % of two-sided groups, nats",
        ("margin/p50_before", "margin/p50_after"),
        band=True,
    ),
    Chart("Shift", "mean size over the kept responses, nats per token", ("shift",)),
    Chart("Where responses went", "share of the responses", ("share/*",), share=True),
    Chart("Visual advantage", "teacher with minus without the image, nats per token", ("visual_advantage/*",)),
    Chart("Scoring", "requests a step", ("scoring/requests", "scoring/reused", "scoring/hedged")),
    Chart("Scoring faults", "failed requests a step", ("scoring/failed/*", "absent_blind")),
    Chart("Loss", "clipped policy loss", ("loss",)),
    Chart("Gradient norm", "before clipping", ("grad_norm",)),
    Chart("Engine against trainer", "|log-prob difference|, nats", ("probe", "mismatch"), log=True),
    Chart("Time of a step", "seconds", ("seconds/*",), stacked=True),
)


def write_report(run: Path) -> Path:
    """Write `report.html` of a run folder, finished or not; return its path.

    Raises:
        UserError: `run` is not a run folder.
    """
    if not (run / "recipe.yaml").is_file():
        raise UserError(f"{run}: not a run folder: it has no recipe.yaml")
    environment = Environment(
        loader=PackageLoader("mmopd.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    recipe_text = (run / "recipe.yaml").read_text(encoding="utf-8")
    metrics = read_lines(run / "metrics.jsonl")
    samples = [sample_view(row) for row in heatmap.choose(heatmap.read_rows(run / "samples.jsonl"))]
    data = {"curves": curves(metrics), "difficulty": difficulty(run / "difficulty" / "difficulty.json")}
    page = environment.get_template("report.html.j2").render(
        name=run.resolve().name,
        recipe=yaml.safe_load(recipe_text),
        recipe_text=recipe_text,
        versions=_json(run / "versions.json", {}),
        steps=len(metrics),
        training_seconds=sum(row.get("seconds") or 0 for row in metrics),
        results=results_view(run / "results.json"),
        stages=stages(_json(run / "stages.json", {})),
        samples=samples,
        has_visual=any(sample["visual"] is not None for sample in samples),
        full_colour=heatmap.FULL_COLOUR,
        has_curves=bool(data["curves"]),
        has_difficulty=bool(data["difficulty"]),
        data=script_json(data),
        plotly=Markup(resources.files("plotly").joinpath("package_data/plotly.min.js").read_text(encoding="utf-8")),
    )
    path = run / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def curves(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the charts for which there are values, with their series."""
    there = list(dict.fromkeys(name for row in metrics for name in row))
    charts = []
    for chart in CHARTS:
        names = dict.fromkeys(n for pattern in chart.names for n in there if fnmatchcase(n, pattern))
        series = [_band(metrics, name) if chart.band else _series(metrics, name) for name in names]
        # A line of zeros is shown only if it is the only one.
        if found := [s for s in series if any(s["y"])] or [s for s in series[:1] if None not in s["y"]]:
            charts.append({k: v for k, v in asdict(chart).items() if k != "names"} | {"series": found})
    return charts


def difficulty(path: Path) -> list[dict[str, Any]]:
    """Return the histogram of each source before and after balancing, as shares of its prompts."""
    if not path.is_file():
        return []
    # Loads torch, which a page without this part does not need.
    from mmopd.prompts.difficulty_counts import histogram, load

    shown = []
    for name, measured in load(path).items():
        if any(measured.attempts):
            before, after = histogram(measured)
            shares = {"before": before / before.sum(), "after": after / after.sum()}
            shown.append(
                {
                    "source": name,
                    "shape": measured.shape,
                    "rows": len(measured.correct),
                    "largest": max(measured.weights),
                }
                | {when: share.round(5).tolist() for when, share in shares.items()}
            )
    return shown


def results_view(path: Path) -> dict[str, Any] | None:
    """Return the results for the page: a table, and for each benchmark a track from the base to the best teacher."""
    if not path.is_file():
        return None
    results = Results.read(path)
    if not results.columns:
        return None
    gaps = results.gaps_closed()
    return {
        "columns": results.columns,
        "rows": [
            {"name": row.name, "kind": row.kind, "cells": [_cell(row.record(c)) for c in results.columns]}
            for row in results.rows
        ],
        "tracks": [_track(results, column, gaps[column]) for column in results.columns],
        "gap_closed": GAP_CLOSED,
        "failures": results.failures(),
    }


def stages(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return each stage with its time and its share of the total, in order of time."""
    total = sum(seconds.values()) or 1.0
    begin = 0.0
    shown = []
    for name, time in seconds.items():
        shown.append({"name": name, "seconds": time, "begin": 100 * begin / total, "width": 100 * time / total})
        begin += time
    return shown


def sample_view(row: heatmap.TokenRow) -> dict[str, Any]:
    """Return a response for the template of the page."""
    pictures = [dict(zip(("url", "width", "height"), heatmap.picture(image), strict=True)) for image in row.images]
    advantages = [a for a in row.advantage if math.isfinite(a)]
    return {
        "row": row,
        "pictures": pictures,
        "cells": list(heatmap.cells(row)),
        "advantage": sum(advantages) / len(advantages) if advantages else 0.0,
        "visual": sum(row.visual) / len(row.visual) if row.visual else None,
    }


def script_json(data: object) -> Markup:
    """Return JSON that is safe inside a <script> element."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    return {
        "name": name.partition("/")[2] or name,
        "x": [row["step"] for row in metrics],
        "y": [row.get(name) for row in metrics],
    }


def _band(metrics: Sequence[Mapping[str, Any]], median: str) -> dict[str, Any]:
    """Return the series of a band, named after the part of the name that follows the percentile."""
    low, high = ([row.get(median.replace("p50", p)) for row in metrics] for p in ("p10", "p90"))
    return _series(metrics, median) | {"name": median.rpartition("p50_")[2], "low": low, "high": high}


def _cell(record: BenchmarkScore | None) -> dict[str, Any]:
    if record is None:
        return {"text": "–", "stderr": None, "failed": False, "title": "not measured"}
    title = f"{record.task}, {record.metric}" + (f", n = {record.n}" if record.n else "")
    if record.score is None:
        return {"text": "failed", "stderr": None, "failed": True, "title": record.reason}
    return {"text": f"{record.score:.1f}", "stderr": record.stderr, "failed": False, "title": title}


def _track(results: Results, column: str, gap: float | None) -> dict[str, Any]:
    """Return the models on a line from 0 to 100."""
    marks = [{"name": r.name, "kind": r.kind, "score": s} for r in results.rows if (s := r.score(column)) is not None]
    return {"column": column, "marks": sorted(marks, key=_on_top), "gap": gap, "segment": _segment(marks)}


def _on_top(mark: Mapping[str, Any]) -> int:
    return ("teacher", "base", "distilled").index(mark["kind"])


def _segment(marks: Iterable[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Return the scores of base and distilled; None if one is missing."""
    ends = {mark["kind"]: mark["score"] for mark in marks}
    return (ends["base"], ends["distilled"]) if {"base", "distilled"} <= ends.keys() else None


def _json(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default
