"""Several runs over each other: one chart for each metric, with a line for each run."""

from collections.abc import Mapping, Sequence
from typing import Any

COLOURS = ("o1", "o4", "t5", "t4", "t6", "t2", "t3", "t7")  # of report.css, one for each run
RUNS = len(COLOURS)


def overlay(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return charts like those of `mmopd.report.charts.curves`, from those of each run by its name."""
    found: dict[tuple[str, str], dict[str, Any]] = {}  # by chart and metric; a task may have several names
    for place, (run, charts) in enumerate(runs.items()):
        for chart in charts:
            for series in chart["series"]:
                one = len(chart["series"]) == 1 and not chart["legend"]
                title = chart["title"] if one else f"{chart['title']}: {series['name']}"
                shown = found.setdefault(
                    (chart["title"], series["metric"]),
                    {**chart, "title": title, "stacked": False, "legend": True, "x": [], "series": []},
                )
                shown["x"] = max(shown["x"], chart["x"], key=lambda x: x[-1] if x else -1)
                shown["series"].append(
                    {**series, "name": run, "colour": COLOURS[place], "dash": "solid", "x": chart["x"]}
                )
    return list(found.values())


def names_of(paths: Sequence[str]) -> list[str]:
    """Return a name for each run folder: its own, or its whole path if two folders have the same."""
    own = [path.rstrip("/").rpartition("/")[2] for path in paths]
    return [name if own.count(name) == 1 else path for name, path in zip(own, paths, strict=True)]
