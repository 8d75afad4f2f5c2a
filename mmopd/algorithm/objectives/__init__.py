"""The objectives that a recipe can name: those in this folder, and those of a workspace, `algorithm/NAME.py`."""

from functools import cache
from pathlib import Path

from mmopd import workspace
from mmopd.algorithm.base import Objective
from mmopd.algorithm.objectives.dense import Dense
from mmopd.algorithm.objectives.exopd import ExOPD
from mmopd.algorithm.objectives.expo import ExPO
from mmopd.algorithm.objectives.grpo import GRPO
from mmopd.algorithm.objectives.opd import OPD
from mmopd.algorithm.objectives.sft import SFT
from mmopd.errors import ConfigError
from mmopd.settings_file import suggest

OBJECTIVES: dict[str, type[Objective]] = {
    "opd": OPD,
    "exopd": ExOPD,
    "grpo": GRPO,
    "sft": SFT,
    "dense": Dense,
    "expo": ExPO,
}
FOLDER = "algorithm"  # of a workspace


def find_objective(kind: str) -> type[Objective]:
    """Return the class of a kind: a built-in one, or the one in the workspace's file `algorithm/KIND.py`.

    Raises:
        ValueError: no objective has this name; the message names the nearest one.
        ConfigError: the workspace's file does not load, holds no objective, or has the name of a built-in one.
    """
    path = Path.cwd() / FOLDER / f"{kind}.py"
    if kind in OBJECTIVES:
        if path.is_file():
            raise ConfigError(f"{path}: `{kind}` is the name of a built-in objective: give the file another name")
        return OBJECTIVES[kind]
    if kind.isidentifier() and path.is_file():
        return _load(path, path.stat().st_mtime_ns)
    known = [*OBJECTIVES, *(path.stem for path in path.parent.glob("*.py"))]
    raise ValueError(f"no objective {kind!r}, and no file {FOLDER}/{kind}.py in {Path.cwd()}{suggest(kind, known)}")


@cache
def _load(path: Path, changed: int) -> type[Objective]:
    """Return the one objective that a file defines.

    Args:
        changed: time of the last change, in ns; a changed file is loaded again.
    """
    module = workspace.load_module(path)
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise ConfigError(f"{path}: it defines {len(own)} classes derived from mmopd.algorithm.Objective; it needs one")
    if own[0].targets is Objective.targets:
        raise ConfigError(f"{path}: {own[0].__name__} has no method `targets(self, step)`")
    return own[0]
