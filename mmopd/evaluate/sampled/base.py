"""The parts of a sampled benchmark: problems, responses, verdicts, and the judge that gives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mmopd.records import Message


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem, with the messages that the model gets."""

    key: str  # unique in its benchmark
    messages: tuple[Message, ...]
    reference: Any  # what its judge needs to know, as JSON types: the answer, or tests


@dataclass(frozen=True, slots=True)
class Sample:
    """Response i of n to a problem."""

    key: str  # of the problem
    i: int
    seed: int  # of its request
    text: str
    tokens: int  # sampled, end token included
    finish: str  # stop | length


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of a response."""

    right: bool | None  # None: unknown, because the judge failed; the benchmark has no score then
    reason: str = ""


class Judge(Protocol):
    """Judges the responses to the problems of a benchmark.

    Attributes:
        version: changes with everything that can change a verdict: packages, tests, limits.
    """

    version: str

    def judge(self, problems: Sequence[Problem], samples: Sequence[Sample]) -> list[Verdict]:
        """Return one verdict for each sample, in order.

        It is called once, with all samples of a benchmark, whose texts have no thoughts. A response that the judge
        cannot judge, because a process died or did not end, has the verdict unknown.

        Args:
            problems: all problems of the benchmark; `key` of a sample names one of them.
        """
