"""The catalogue: modalities/, teachers/, data/, eval/ and recipes/, of the workspace first and then as shipped.

A name such as `recipes/demo.yaml` is looked for in the workspace (the current folder, or another that is given), then
among the files that came with the package, so that a workspace holds only what a person added or changed.
"""

import importlib.util
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import mmopd
from mmopd import settings_file
from mmopd.config import Comparison, Config, Fleet, Mixture, Recipe, Suite
from mmopd.errors import UserError

KINDS = ("modalities", "teachers", "data", "eval", "recipes")

C = TypeVar("C", bound=Config)


def shipped() -> Path:
    """The folder with the shipped catalogue: inside the package if it was installed, above it in a source checkout."""
    package = Path(mmopd.__file__).parent
    installed = package / "_catalog"
    return installed if installed.is_dir() else package.parent


def find(name: str | Path, workspace: Path | None = None) -> Path:
    """The file that `KIND/NAME` stands for, or any other path if it exists.

    Raises:
        UserError: there is no such file; names what there is.
    """
    roots = (workspace or Path.cwd(), shipped())
    for root in roots:
        if (path := root / name).is_file():  # an absolute name is itself
            return path
    kind = Path(name).parent
    suffix = Path(name).suffix
    known = {str(kind / path.name) for root in roots for path in (root / kind).glob(f"*{suffix}")}
    raise UserError(f"{name}: no such file in {roots[0]}, nor is it shipped{settings_file.suggest(str(name), known)}")


def load_fleet(name: str | Path, workspace: Path | None = None) -> Fleet:
    """A file of teachers/."""
    return _load(Fleet, name, workspace)


def load_mixture(name: str | Path, workspace: Path | None = None) -> Mixture:
    """A file of data/."""
    return _load(Mixture, name, workspace)


def load_suite(name: str | Path, workspace: Path | None = None) -> Suite:
    """A file of eval/."""
    return _load(Suite, name, workspace)


def load_comparison(name: str | Path, workspace: Path | None = None) -> Comparison:
    """A file recipes/compare_*.yaml."""
    return _load(Comparison, name, workspace)


def load_recipe(name: str | Path, workspace: Path | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """A file of recipes/, with `key.path=value` overrides on top."""
    return _load(Recipe, name, workspace, overrides)


def load_module(path: Path) -> ModuleType:
    """Run a `.py` of the catalogue, which is no package.

    Raises:
        UserError: it raises; names the file and the line.
    """
    name = f"mmopd_catalog_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = 0
        trace = error.__traceback__
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(path) else line
            trace = trace.tb_next
        raise UserError(f"{path}{f':{line}' if line else ''}: {type(error).__name__}: {error}") from error
    return module


def init(folder: Path) -> list[Path]:
    """Copy the shipped catalogue into a folder, files that are there already excepted; returns what was written.

    Raises:
        UserError: `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file; name a folder for the workspace")
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


def _load(cls: type[C], name: str | Path, workspace: Path | None, overrides: Iterable[str] = ()) -> C:
    return settings_file.read(cls, find(name, workspace), overrides)
