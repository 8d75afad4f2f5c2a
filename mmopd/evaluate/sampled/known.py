"""The benchmarks that mmopd samples itself, by name: data, prompt and judge of each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mmopd.evaluate.sampled.base import Judge, Problem
from mmopd.evaluate.sampled.source import Row, Source


@dataclass(frozen=True, slots=True)
class Known:
    """A benchmark: where its rows are, how a row becomes a problem, and who judges.

    `problem` may return None for a row that does not belong to it, such as one outside of a window of dates.
    """

    source: Source
    problem: Callable[[Row], Problem | None]
    judge: Callable[[], Judge]  # makes the judge; a UserError says what it needs and what is missing


BENCHMARKS: Mapping[str, Known] = {}
