"""Records of a step: prompt, response, outcome, score, sample."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

Message = Mapping[str, Any]
# Files of one item of a medium (`mmopd.modality.base`), each an encoded image (PNG, JPEG, ...).
Files = tuple[bytes, ...]
Grid = tuple[int, int, int]  # (time, rows, columns), in patches


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row of a shard: the question to the student, and the answer key."""

    key: str  # "source/row", unique in a run
    task: str  # a name of modalities/
    modality: str  # text, or the name of a medium
    messages: tuple[Message, ...]  # messages of a chat; a part {"type": MEDIUM} stands for the next item of that medium
    images: tuple[bytes, ...]  # encoded (PNG, JPEG, ...); not decoded here
    answer: str
    # More texts of the row for views: caption, ocr, hint, ...
    extra: Mapping[str, str] = field(default_factory=dict)
    # Medium -> its items, for media other than images.
    others: Mapping[str, tuple[Files, ...]] = field(default_factory=dict)

    @property
    def is_visual(self) -> bool:
        """True if the prompt has an item of any medium."""
        return bool(self.images) or any(self.others.values())

    def items(self, medium: str) -> tuple[Files, ...]:
        """Return the items of a medium, in the order of the messages."""
        return tuple((image,) for image in self.images) if medium == "image" else self.others.get(medium, ())

    def with_items(self, medium: str, items: Sequence[Files]) -> "Prompt":
        """Return the prompt with other items of a medium."""
        if medium == "image":
            return replace(self, images=tuple(image for (image,) in items))
        return replace(self, others={**self.others, medium: tuple(items)})


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as token ids, in the two forms that a vision-language model has."""

    prompt: Prompt
    ids: tuple[int, ...]  # one placeholder per item of a medium: sent to a server, with the files
    # One placeholder per visual token: the model's input, and the ids that a server must return.
    expanded: tuple[int, ...]
    grids: tuple[Grid, ...]  # of all items, in the order of `modality.registry.shown_items`


@dataclass(frozen=True, slots=True)
class Response:
    """A sampled answer: ids and the student's log-probs before temperature, end token included."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: str  # stop | length
    # Versions of the weights that sampled it, in order, each with its number of tokens.
    versions: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a verifier: 1 right, 0 wrong, in between for soft scores; NaN with a reason for unknown."""

    value: float
    reason: str = ""  # begins with a cause that can be counted, up to a colon or a quotation mark

    @property
    def known(self) -> bool:
        """True if there is a value."""
        return not math.isnan(self.value)

    @property
    def cause(self) -> str:
        """The countable part of the reason: timeout, ValueError, the_answer_key, ..."""
        return re.split("[:'\"]", self.reason)[0].strip().replace(" ", "_") or "no_reason"


UNKNOWN = math.nan


@dataclass(frozen=True, slots=True)
class Score:
    """Log-prob of each response token by the teacher of its prompt, or the weighted mean of several teachers."""

    teacher: str  # name of the teacher; "a+b" for several
    logprobs: tuple[float, ...]
    weight: float = 1.0  # w_k of Eq. 4
    # Id -> log-prob of the likeliest ids at each position, if they were requested; without those beyond the student's
    # head.
    top: tuple[Mapping[int, float], ...] | None = None


@dataclass(frozen=True, slots=True)
class Absent:
    """A missing score: the response is left out of the loss and of every statistic, and is counted by cause."""

    teacher: str
    cause: str  # a short, countable word: timeout, status, ids, non_finite, connection, malformed, view
    detail: str = ""
    of_prompt: bool = False  # the teacher answers, and refuses this prompt; or its view cannot show the prompt


@dataclass(frozen=True, slots=True)
class Sample:
    """A response with all that is known about it; `group` is the number of its prompt in the step, over all ranks."""

    group: int
    response: Response
    outcome: Outcome
    score: Score | Absent | None  # None if the objective needs none
    blind: Score | Absent | None = None  # by the same teacher with blank images; None if it was not requested
    reference: Score | None = None  # by the teacher's reference (ExOPD); if it is missing, `score` is absent
