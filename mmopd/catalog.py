"""The catalogue: modalities/, teachers/, data/, eval/ and recipes/, first of the workspace, then as shipped.

A name such as `recipes/demo.yaml` is searched first in the workspace (the current folder, or a given one), then among
the files of the package, so that a workspace holds only added or changed files.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from mmopd import settings_file
from mmopd.config import Comparison, Fleet, Mixture, Recipe, Suite
from mmopd.errors import UserError
from mmopd.settings_file import File
from mmopd.workspace import find, load_module, shipped

__all__ = [
    "KINDS",
    "find",
    "init",
    "is_mixture",
    "load_comparison",
    "load_fleet",
    "load_mixture",
    "load_module",
    "load_recipe",
    "load_suite",
    "shipped",
]

KINDS = ("modalities", "teachers", "data", "eval", "recipes")

C = TypeVar("C", bound=File)


def load_fleet(name: str | Path, workspace: Path | None = None, key: str = "") -> Fleet:
    """Load a fleet from a file of teachers/; `key` is the setting that names it, for the message if it is missing."""
    return _load(Fleet, name, workspace, key=key)


def load_mixture(name: str | Path, workspace: Path | None = None, key: str = "") -> Mixture:
    """Load a mixture from a file of data/; `key` is the setting that names it, for the message if it is missing."""
    return _load(Mixture, name, workspace, key=key)


def is_mixture(path: Path) -> bool:
    """Return true for the file of a mixture; false for a recipe, and for a file of another kind (its loader says so).

    Raises:
        ConfigError: the file cannot be read, or is no YAML.
    """
    return "sources" in settings_file.keys_of(path)


def load_suite(name: str | Path, workspace: Path | None = None) -> Suite:
    """Load a suite from a file of eval/."""
    return _load(Suite, name, workspace)


def load_comparison(name: str | Path, workspace: Path | None = None) -> Comparison:
    """Load a comparison from a file recipes/compare_*.yaml."""
    return _load(Comparison, name, workspace)


def load_recipe(
    name: str | Path, workspace: Path | None = None, overrides: Iterable[str] = (), *, key: str = ""
) -> Recipe:
    """Load a recipe from a file of recipes/, with `key.path=value` overrides; `key` as for `load_fleet`."""
    return _load(Recipe, name, workspace, overrides, key=key)


def init(folder: Path) -> list[Path]:
    """Copy the shipped catalogue into a folder, without existing files; return the written files.

    Raises:
        UserError: `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: this is a file; choose a folder for the workspace")
    written = []
    for kind in KINDS:
        root = shipped() / kind
        for source in sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
            target = folder / kind / source.relative_to(root)
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
                written.append(target)
    return written


def _load(cls: type[C], name: str | Path, workspace: Path | None, overrides: Iterable[str] = (), *, key: str = "") -> C:
    return settings_file.read(cls, find(name, workspace, key), overrides)
