"""The records that travel through a step: prompt, response, outcome, score, sample (design words, one class each)."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Message = Mapping[str, Any]
Files = tuple[bytes, ...]  # of one item of a medium (`mmopd.modality.base`), each an encoded image (PNG, JPEG, ...)
Grid = tuple[int, int, int]  # (time, rows, columns), in patches


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a shard: what the student is asked, and the key to the answer."""

    key: str  # "source/row", unique in a run
    task: str  # a name of modalities/
    modality: str  # text, or the name of a medium
    messages: tuple[Message, ...]  # of a chat; a part {"type": MEDIUM} stands for the next item of that medium
    images: tuple[bytes, ...]  # encoded (PNG, JPEG, ...), never decoded here
    answer: str
    extra: Mapping[str, str] = field(
        default_factory=dict
    )  # more texts of the row that a view may use: caption, ocr, hint, ...
    others: Mapping[str, tuple[Files, ...]] = field(default_factory=dict)  # medium -> its items, where it is not images

    @property
    def is_visual(self) -> bool:
        """True if there is anything to see."""
        return bool(self.images) or any(self.others.values())

    def items(self, medium: str) -> tuple[Files, ...]:
        """The items of a medium, in the order of the messages."""
        return tuple((image,) for image in self.images) if medium == "image" else self.others.get(medium, ())

    def with_items(self, medium: str, items: Sequence[Files]) -> "Prompt":
        """The prompt with other items of a medium in place of its own."""
        if medium == "image":
            return replace(self, images=tuple(image for (image,) in items))
        return replace(self, others={**self.others, medium: tuple(items)})


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as token ids, in the two forms that a vision-language model has."""

    prompt: Prompt
    ids: tuple[int, ...]  # one placeholder per item of a medium: what a server is sent, with the files
    expanded: tuple[int, ...]  # one placeholder per visual token: what the model sees, what the server must answer with
    grids: tuple[Grid, ...]  # of all items, in the order of `modality.registry.shown_items`


@dataclass(frozen=True, slots=True)
class Response:
    """One sampled answer: ids and the student's own log-probs, before temperature, end token included."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: str  # stop | length
    versions: tuple[tuple[str, int], ...]  # of the weights that sampled it, in order, each with its number of tokens


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a verifier says: 1 right, 0 wrong, between for soft scores; NaN with a reason for unknown."""

    value: float
    reason: str = ""  # begins with what can be counted, up to a colon or a quotation mark

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return not math.isnan(self.value)

    @property
    def cause(self) -> str:
        """The countable part of the reason: timeout, ValueError, the_answer_key, ..."""
        return re.split("[:'\"]", self.reason)[0].strip().replace(" ", "_") or "no_reason"


UNKNOWN = math.nan


@dataclass(frozen=True, slots=True)
class Score:
    """The log-prob of each response token by the teacher of its prompt, or the weighted mean of several teachers'."""

    teacher: str  # its name; "a+b" where several were asked
    logprobs: tuple[float, ...]
    weight: float = 1.0  # w_k of Eq. 4
    top: tuple[Mapping[int, float], ...] | None = (
        None  # id -> log-prob of the likeliest ids at each position, if they were asked for
    )


@dataclass(frozen=True, slots=True)
class Absent:
    """A score that could not be had: it leaves the loss and every statistic, and is counted by cause."""

    teacher: str
    cause: str  # a short, countable word: timeout, status, ids, non_finite, connection, malformed, view
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A response with all that is known of it; `group` is the number of its prompt in the step, over all ranks."""

    group: int
    response: Response
    outcome: Outcome
    score: Score | Absent | None  # None where the objective asks for none
    blind: Score | Absent | None = None  # by the same teacher with blank images; None where it was not asked for
    reference: Score | None = None  # by the teacher's reference (ExOPD); where that could not be had, `score` is absent
