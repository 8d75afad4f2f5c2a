"""What `mmopd inspect` shows: rows or responses, chosen by filters, with what could not be read. Loads no torch."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from typing import TypeVar

from mmopd.records import Files, Prompt
from mmopd.report.heatmap import Response
from mmopd.report.run_files import LeftOut, RunFiles

T = TypeVar("T")
SURPRISING = 20  # tokens with the largest difference that are listed
BEFORE = 12  # tokens that are shown before such a token
AFTER = 4


@dataclass(frozen=True, slots=True)
class Filters:
    """Which rows or responses are wanted; None wants all."""

    source: str | None = None
    difficulty: str | None = None  # never, sometimes, always, unjudged: how often the untrained student is right
    outcome: str | None = None
    teacher: str | None = None
    keys: tuple[str, ...] = ()

    def wants(self, key: str, counts: "Counts | None") -> bool:
        """Return true for a row of this key that the untrained student answers rightly so often."""
        if self.source is not None and key.rpartition("/")[0] != self.source:
            return False
        if self.keys and key not in self.keys:
            return False
        return self.difficulty is None or (counts is not None and counts.hardness == self.difficulty)


@dataclass(frozen=True, slots=True)
class Counts:
    """How often the untrained student answers a row rightly."""

    right: int
    judged: int

    @property
    def hardness(self) -> str:
        """Return how often, in a word: never, sometimes, always, unjudged."""
        if not self.judged:
            return "unjudged"
        return "never" if not self.right else "always" if self.right == self.judged else "sometimes"

    def __str__(self) -> str:
        if not self.judged:
            return "the untrained student's answers could not be judged"
        return f"the untrained student is {self.hardness} right: {self.right} of {self.judged}"


@dataclass(frozen=True, slots=True)
class Seen:
    """A prompt as the student or a teacher reads it."""

    reader: str  # student, or the name of a teacher
    view: str  # what the teacher's view changes; empty for all of it
    ids: tuple[int, ...]  # sent to the server: one placeholder for each item of a medium
    expanded: int  # tokens of the model's input
    text: str  # the ids as text, with control tokens
    items: tuple[Files, ...]  # sent with the ids, in order
    problem: str = ""  # why it cannot be shown

    def same_as(self, other: "Seen") -> bool:
        """Return true if both read the same ids and items."""
        return not self.problem and (self.ids, self.items) == (other.ids, other.items)


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of a shard; or, with `response`, a recorded response to it."""

    key: str
    prompt: Prompt | None  # None for a response whose row is not at hand
    tokens: int | None = None  # of the prompt, if they are counted
    counts: Counts | None = None
    seen: tuple[Seen, ...] = ()
    response: Response | None = None


@dataclass(frozen=True, slots=True)
class Surprise:
    """A token of a recorded response that teacher and student find differently likely."""

    response: Response
    place: int  # from 1, in the whole response
    token: str
    before: str
    after: str
    student: float
    teacher: float

    @property
    def difference(self) -> float:
        """Log-ratio teacher / student, in nats."""
        return self.teacher - self.student

    @property
    def probabilities(self) -> tuple[float, float]:
        """Probability of the token by student and teacher."""
        return math.exp(min(0.0, self.student)), math.exp(min(0.0, self.teacher))  # a damaged file has any number


@dataclass(frozen=True, slots=True)
class Found:
    """What is shown: the first entries of all that match."""

    what: str  # the shards, the run or the file
    entries: Sequence[Entry]
    matching: int
    total: int
    surprises: Sequence[Surprise] = ()
    remarks: Sequence[str] = ()
    left_out: LeftOut = field(default_factory=LeftOut)
    files: RunFiles | None = None  # has the images of responses


def surprises(responses: Iterable[Response]) -> list[Surprise]:
    """Return the tokens with the largest differences between teacher and student, the largest first."""
    places = (
        (response, i)
        for response in responses
        for i in range(len(response.row.tokens))
    )  # fmt: skip
    largest = nlargest(SURPRISING, places, key=lambda at: abs(at[0].row.teacher[at[1]] - at[0].row.student[at[1]]))
    return [_surprise(response, i) for response, i in largest]


def _surprise(response: Response, i: int) -> Surprise:
    row = response.row
    left_out = response.tokens - len(row.tokens)
    start = response.head if left_out and i >= response.head else 0  # tokens between head and tail are not there
    return Surprise(
        response,
        place=1 + i + (left_out if start else 0),
        token=row.tokens[i],
        before="".join(row.tokens[max(start, i - BEFORE) : i]),
        after="".join(row.tokens[i + 1 : i + 1 + AFTER]),
        student=row.student[i],
        teacher=row.teacher[i],
    )


def by_key(counts: Mapping[int, tuple[int, int]], row: int) -> Counts | None:
    """Return the counts of a row, if it was measured."""
    return Counts(*counts[row]) if row in counts else None


def in_turn(groups: Mapping[str, Sequence[T]]) -> Iterator[tuple[str, T]]:
    """Yield the first item of each group with its name, then the second ones, and so on."""
    for i in range(max(map(len, groups.values()), default=0)):
        for name, items in groups.items():
            if i < len(items):
                yield name, items[i]
