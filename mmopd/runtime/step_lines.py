"""Steps of a run as its terminal shows them: a line for each step in a log, a few rows for the latest on a screen."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmopd.errors import DataError

Metrics = Mapping[str, Any]

# Counts of responses in the shown line of a step.
COUNTS = {
    "kept": "kept",
    "masked": "masked",
    "absent": "failed",
    "unknown": "unknown",
}
# Counts of faults in the metrics of a step.
FAULTS = {
    "absent": "responses without a score",
    "unknown": "responses without an outcome",
    "skipped_updates": "updates skipped",
}
# Counts since the start of the run, by prefix; the rest of the key says which.
SINCE_START = {"replaced/": "rows replaced", "loggers/failed/": "calls of loggers failed"}
# Metrics that are compared with those of the first step.
LEARNS = ("return", "loss", "reverse_kl", "response_length")
# Memory in use, by the end of the key.
MEMORY = {"memory/host": "host", "memory/gpu": "GPU", "memory/rank0": "rank 0"}


class NewSteps:
    """Reads the lines that are appended to a metrics file.

    Args:
        path: metrics.jsonl; need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[Metrics]:
        """Return the steps that were written since the last call, or since this object was made.

        A line that is not complete yet is left for the next call.

        Raises:
            DataError: a line is damaged.
        """
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            # A resume cuts what follows the checkpoint.
            self._offset = file.seek(min(self._offset, file.seek(0, os.SEEK_END)))
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [parse(self._path, line) for line in whole.splitlines()]


def parse(path: Path, line: bytes) -> dict[str, Any]:
    """Return the metrics in a complete line of a metrics file.

    Raises:
        DataError: the line is damaged.
    """
    try:
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            return found
        problem = "it is no JSON object with the number of a step"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    raise DataError(f"{path}: the line that begins with {line[:40]!r} is damaged: {problem}; delete it, and resume")


class Glance:
    """The latest step next to the first one, with the faults since the start of this command.

    Args:
        restarts: how often each server was started again; read whenever the rows are made.
    """

    def __init__(self, restarts: Mapping[str, int]) -> None:
        self._first: Metrics = {}
        self._latest: Metrics = {}
        self._faults = Counter[str]()
        self._restarts = restarts

    def add(self, step: Metrics) -> None:
        """Take one more step."""
        self._first = self._first or step
        self._latest = step
        self._faults.update({what: round(step[key]) for key, what in FAULTS.items() if step.get(key)})

    def rows(self) -> str:
        """Return one row for each subject, as text; empty before the first step."""
        step = self._latest
        if not step:
            return ""
        change = {
            key: f"{self._first[key]:.2f} → {step[key]:.2f}" for key in step if step[key] is not None and self._had(key)
        }
        right = [f"{key.removeprefix('accuracy/')} {change[key]}" for key in change if key.startswith("accuracy/")]
        learnt = [f"{key} {change[key]}" for key in LEARNS if key in change]
        rows = {
            "right": right,
            "learns": learnt,
            "responses": _counts(step),
            "faults": self._since_start() or ["none"],
            "memory": _memory(step),
        }
        return "\n".join(f"  {name:<10} {'   '.join(parts)}" for name, parts in rows.items() if parts)

    def _had(self, key: str) -> bool:
        return isinstance(self._first.get(key), int | float)

    def _since_start(self) -> list[str]:
        counts = [f"{number} {what}" for what, number in self._faults.items()]
        for prefix, what in SINCE_START.items():
            if number := sum(value for key, value in self._latest.items() if key.startswith(prefix)):
                counts.append(f"{number:.0f} {what}")
        return counts + [f"{name} restarted {times} x" for name, times in self._restarts.items() if times]


def one_line(metrics: Metrics) -> str:
    """Return the summary of a step that is printed during a run."""
    accuracy = "  ".join(
        f"{key.removeprefix('accuracy/')} {value:.2f}"
        for key, value in metrics.items()
        if key.startswith("accuracy/") and value is not None
    )
    name, form = ("return", "+.3f") if metrics.get("return") is not None else ("loss", ".3f")
    learnt = f"{name} {_number(metrics, name):{form}}"
    right = [f"right: {accuracy}"] if accuracy else []
    seconds = f"{_number(metrics, 'seconds'):.1f} s/step"
    return "  ".join([seconds, learnt, *right, *_counts(metrics), *_memory(metrics)])


def _number(metrics: Metrics, key: str) -> float:
    number = metrics.get(key)
    return math.nan if number is None else float(number)


def _counts(metrics: Metrics) -> list[str]:
    return [f"{what} {metrics[key]:.0f}" for key, what in COUNTS.items() if metrics.get(key) is not None]


def _memory(metrics: Metrics) -> list[str]:
    return [f"{what} {metrics[key]:.1f} GiB" for key, what in MEMORY.items() if metrics.get(key) is not None]
