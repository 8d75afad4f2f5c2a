"""The record of one benchmark of one model: a score, or the reason why there is none. All runners fill this form."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from mmopd.errors import DataError


class InvalidRunError(Exception):
    """A measurement that does not count; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """Result of a valid measurement: score and standard error on 0-100, over n questions.

    `sent` has what was sent with each question: max_tokens, temperature, and how many responses were wanted.
    `more` has further numbers on the same responses, as in `BenchmarkScore`.
    """

    score: float
    stderr: float | None
    n: int
    versions: dict[str, str]
    sent: dict[str, Any]
    more: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class BenchmarkScore:
    """One benchmark of one model: a score, or the reason why there is none."""

    endpoint: str
    role: str
    column: str
    task: str
    metric: str
    status: Literal["ok", "failed"]
    reason: str  # empty if ok
    score: float | None  # 0-100
    stderr: float | None  # of the score; None if the task has none
    n: int | None  # questions
    weights: str  # hash of the model's files, or empty
    data: str  # hash of the local data, or empty for the task's own
    settings: Mapping[str, Any]  # how it was asked; of a failed benchmark, as far as the suite says it
    versions: Mapping[str, str]
    seconds: float
    reused: bool = False
    # Further numbers on the same responses, such as pass@8 and its pass@8_stderr on 0-100.
    more: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "BenchmarkScore":
        """Read a record that `write` wrote.

        Raises:
            DataError: the file is damaged.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: damaged ({error}); delete it to measure again") from None

    def write(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")
        partial.replace(path)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean over questions and its standard error; no error for a single question.

    The responses to a question are alike, so that the spread of questions, and not of responses, decides the error.
    """
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def key_of(*parts: Sequence[Any] | Mapping[str, Any] | str) -> str:
    """Return the key under which a result is kept: a hash of all that decides it."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
