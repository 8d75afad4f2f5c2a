"""What a logger does, and what it is given: metrics, samples as a table, the results table."""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import yaml
from PIL import Image

from mmopd.evaluate.table import Results
from mmopd.report.heatmap import TokenRow, decoded
from mmopd.runtime.run_folder import RunFolder

PROJECT = "mmopd"  # of runs whose environment names no project
Cell = str | float | None


class Logger(ABC):
    """A run at one service. The constructor starts the run there, or goes on with it; any method may raise.

    Args:
        run: the run folder.
        id: the run at the service, from the state of an earlier part of the run; empty at its start.
    """

    keeps: ClassVar[bool] = True  # false: a resumed run is sent from its first step, in place of what was sent before

    def __init__(self, run: Path, id: str) -> None:
        self.id = id

    @abstractmethod
    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics of a step; they are finite."""

    @abstractmethod
    def samples(self, step: int, rows: Sequence[TokenRow]) -> None:
        """Send the responses of a step that were written token by token."""

    @abstractmethod
    def results(self, step: int, results: Results) -> None:
        """Send the table of the benchmarks, at the last step."""

    @abstractmethod
    def close(self) -> None:
        """End this part of the run; wait until all of it is sent."""


def config_of(run: Path) -> dict[str, Any]:
    """Return the resolved recipe of a run folder, with the versions."""
    folder = RunFolder(run)
    recipe: dict[str, Any] = yaml.safe_load(folder.recipe_file.read_text(encoding="utf-8"))
    return recipe | ({"versions": folder.known_versions()} if folder.versions.is_file() else {})


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the settings by key with dots."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found


def project(variable: str) -> str:
    """Return the project that an environment variable of the service names, or `PROJECT`."""
    return os.environ.get(variable) or PROJECT


def sample_cells(row: TokenRow) -> dict[str, Cell]:
    """Return the columns of a sample, without its picture."""
    values = zip(row.tokens, row.student, row.teacher, row.advantage, strict=True)
    return {
        "step": row.step,
        "task": row.task,
        "prompt": row.prompt,
        "response": "".join(row.tokens),
        "verdict": row.verdict,
        "reason": row.reason,
        "teacher": row.teacher_name,
        "return": row.reward,
        "kept": str(row.kept).lower(),
        "tokens: text, student, teacher, advantage": json.dumps([list(v) for v in values], ensure_ascii=False),
    }


def picture_of(row: TokenRow) -> Image.Image | None:
    """Return the images of a sample upright and next to each other, as one; None if it has none."""
    images: list[Image.Image] = []
    for encoded in row.images:
        with decoded(encoded) as (_, image):
            images.append(image.convert("RGB"))
    if not images:
        return None
    *lefts, width = accumulate((image.width for image in images), initial=0)
    canvas = Image.new("RGB", (width, max(image.height for image in images)), "white")
    for left, image in zip(lefts, images, strict=True):
        canvas.paste(image, (left, 0))
    return canvas


def results_rows(results: Results) -> tuple[list[str], list[list[Cell]]]:
    """Return the columns and rows of the results table, the closed gaps last."""
    rows: list[list[Cell]] = [
        [row.name, row.kind, *(row.score(column) for column in results.columns)] for row in results.rows
    ]
    gaps = results.gaps_closed()
    return ["model", "kind", *results.columns], [*rows, ["gap closed", "", *(gaps[c] for c in results.columns)]]
