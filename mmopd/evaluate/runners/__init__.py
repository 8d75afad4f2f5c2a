"""What measures the rows of a suite: one file for each runner."""

from collections.abc import Mapping
from typing import Any

from mmopd.evaluate.runners.base import Runner
from mmopd.evaluate.runners.lmms import Lmms

RUNNERS: Mapping[str, Runner[Any, Any]] = {"lmms": Lmms()}  # `runner` of a row -> what measures it
