"""Check shapes and types in `algorithm/` and packing at run time: in every test, and in the ranks that tests start.

Import this before any module of mmopd: jaxtyping's hook changes modules as they are imported.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from jaxtyping import install_import_hook

ALGORITHM = Path(__file__).parents[1] / "mmopd" / "algorithm"
PYDANTIC = {"__init__", "base", "settings"}  # models; pydantic checks their values
TENSORS = [f"mmopd.algorithm.{path.stem}" for path in sorted(ALGORITHM.glob("*.py")) if path.stem not in PYDANTIC]

P = ParamSpec("P")
R = TypeVar("R")

install_import_hook([*TENSORS, "mmopd.train.pack", "mmopd.train.prefix_tree"], "beartype.beartype")


def unchecked(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function without the check of its annotations, for tests of the errors that it raises itself."""
    return inspect.unwrap(function)
