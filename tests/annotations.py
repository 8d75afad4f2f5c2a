"""Check shapes and types in `algorithm/` and packing at run time: in every test, and in the ranks that tests start.

Import this before any module of mmopd: jaxtyping's hook changes modules as they are imported.
"""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from beartype import beartype
from jaxtyping import install_import_hook, jaxtyped

ALGORITHM = Path(__file__).parents[1] / "mmopd" / "algorithm"
PYDANTIC = {"__init__", "base", "settings"}  # models; pydantic checks their values
TENSORS = [f"mmopd.algorithm.{path.stem}" for path in sorted(ALGORITHM.glob("*.py")) if path.stem not in PYDANTIC]

P = ParamSpec("P")
R = TypeVar("R")

install_import_hook([*TENSORS, "mmopd.train.pack", "mmopd.train.prefix_tree"], "beartype.beartype")


def check_objectives() -> None:
    """Check the methods of the built-in objectives.

    Their files import tensor types only for type checkers, so that a recipe is read without torch. The hook would take
    such a type for `Any`.
    """
    from torch import Tensor

    from mmopd.algorithm.base import Objective
    from mmopd.algorithm.objectives import OBJECTIVES
    from mmopd.algorithm.settings import Algorithm
    from mmopd.algorithm.step import Step, Targets, Tokens

    types = {"Tensor": Tensor, "Algorithm": Algorithm, "Step": Step, "Targets": Targets, "Tokens": Tokens}
    for objective in (Objective, *OBJECTIVES.values()):
        vars(sys.modules[objective.__module__]).update(types)
        for name, method in list(vars(objective).items()):
            if inspect.isfunction(method):
                setattr(objective, name, jaxtyped(method, typechecker=beartype))


check_objectives()


def unchecked(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function without the check of its annotations, for tests of the errors that it raises itself."""
    return inspect.unwrap(function)
