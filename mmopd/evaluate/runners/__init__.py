"""What measures the rows of a suite: one file for each runner."""

from collections.abc import Mapping
from typing import Any

from mmopd.evaluate.runners.base import Runner
from mmopd.evaluate.runners.lmms import Lmms
from mmopd.evaluate.runners.sampled import Sampled

RUNNERS: Mapping[str, Runner[Any, Any]] = {  # `runner` of a row -> what measures it
    "lmms": Lmms(),
    "sampled": Sampled(),
}
