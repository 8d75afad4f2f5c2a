"""Responses token by token: the log-probs of teacher and student, with the difference as a colour.

A row of `samples.jsonl` is a `TokenRow`. The report shows some of them, chosen by `choose`, as `Response`.
"""

import base64
import dataclasses
import io
import math
import struct
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from mmopd.records import Files, Prompt, Sample, Score

FULL_COLOUR = 3.0  # nats; one of the two gives the token a probability e^3 = 20 times higher
THUMBNAIL = 640  # pixels
HEAVY = 300_000  # bytes of a small image that is compressed again
PIXELS = 50_000_000  # an image with more is not decoded
SHOWN_BY_BROWSERS = ("PNG", "JPEG", "GIF", "WEBP")
FILES = 8  # number of files of an item that are written
DAMAGED = (ValueError, OSError, SyntaxError, EOFError, LookupError, struct.error, Image.DecompressionBombError)
TAIL = 100  # last tokens of a long response, where its answer is
FIRST = {"wrong": 2, "unknown": 1, "partly": 1, "right": 1}  # responses of a task and a step that are shown first


LISTS = ("tokens", "student", "teacher", "advantage", "visual")  # [T] of a row


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A scored response with T tokens; its fields are JSON values."""

    step: int
    task: str
    modality: str  # text, or the name of a medium
    prompt: str  # text of the prompt
    images: list[str]  # base64 of encoded files (PNG, JPEG, ...): the images, and some of each item of another medium
    tokens: list[str]  # [T] text of each token
    student: list[float]  # [T] log-prob by the policy that sampled it
    teacher: list[float]  # [T] log-prob by the teacher
    advantage: list[float]  # [T] advantage in the loss, after calibration
    outcome: float | None  # 1 right, 0 wrong, in between for soft scores, None unknown
    teacher_name: str
    kept: bool  # true if it was in the loss
    # [T] log-prob by the teacher with minus without the image; None if not requested.
    visual: list[float] | None = None
    reason: str = ""  # cause of an unknown outcome, or another remark of the verifier
    answer: str = ""  # the answer key; empty in files of earlier versions
    key: str = ""  # "source/row" of the prompt; empty in files of earlier versions

    @property
    def reward(self) -> float:
        """R, the mean over tokens of teacher minus student (Eq. 5), in nats."""
        return _mean([t - s for t, s in zip(self.teacher, self.student, strict=True)])

    @property
    def verdict(self) -> str:
        """Outcome in words: right | wrong | unknown | partly."""
        if self.outcome is None:
            return "unknown"
        return {1.0: "right", 0.0: "wrong"}.get(self.outcome, "partly")

    def check(self) -> None:
        """Raise ValueError if this is no response: its lists differ in length, or a value is not finite."""
        numbers = [self.student, self.teacher, self.advantage, *([] if self.visual is None else [self.visual])]
        if any(len(values) != len(self.tokens) for values in numbers):
            raise ValueError(
                f"{len(self.tokens)} tokens, but {', '.join(str(len(v)) for v in numbers)} values for them"
            )
        if not all(abs(value) < 1e30 for value in chain(*numbers)):  # false for NaN, too
            raise ValueError("a value of a token is not finite")
        if not self.tokens:
            raise ValueError("no tokens")
        if self.step < 0 or not (self.outcome is None or 0 <= self.outcome <= 1):
            raise ValueError(f"step {self.step} or outcome {self.outcome} cannot be")


@dataclass(frozen=True, slots=True)
class Response:
    """A row as the page shows it: its first tokens and its last, the means over all, and its place in the file."""

    row: TokenRow  # without images
    tokens: int  # T of the whole response
    head: int  # number of first tokens in `row`; the others are the last
    reward: float
    advantage: float
    visual: float | None
    file: Path
    offset: int


def clipped(row: TokenRow, limit: int, file: Path = Path(), offset: int = 0) -> Response:
    """Return a response with at most `limit` tokens: its first, and the last `TAIL`."""
    T = len(row.tokens)
    head = T if limit >= T else limit - TAIL
    keep = slice(0, head), slice(T if head == T else T - TAIL, T)
    lists = {name: values for name in LISTS if (values := getattr(row, name)) is not None}
    short: dict[str, Any] = {name: [value for part in keep for value in values[part]] for name, values in lists.items()}
    visual = _mean(row.visual) if row.visual else None
    return Response(replace(row, images=[], **short), T, head, row.reward, _mean(row.advantage), visual, file, offset)


def token_row(
    step: int,
    prompt: Prompt,
    sample: Sample,
    tokens: Sequence[str],
    advantage: Sequence[float],
    *,
    kept: bool,
    visual: Sequence[float] | None = None,
) -> TokenRow:
    """Return the row of a scored response to `prompt`.

    Args:
        step: number of the step.
        prompt: the prompt.
        sample: the response with its score and outcome.
        tokens: [T] text of each response token.
        advantage: [T] advantage in the loss.
        kept: true if it was in the loss.
        visual: [T] log-prob by the teacher with minus without the image, if both were requested.

    Raises:
        ValueError: the sample has no score.
    """
    shown = chain(prompt.items("image"), *prompt.others.values())
    if not isinstance(sample.score, Score):
        raise ValueError(f"a response to {prompt.key} has no score: {sample.score}")
    return TokenRow(
        step=step,
        task=prompt.task,
        modality=prompt.modality,
        prompt="\n".join(_texts(prompt.messages)),
        images=[base64.b64encode(file).decode() for files in shown for file in _some(files)],
        tokens=list(tokens),
        student=list(sample.response.logprobs),
        teacher=list(sample.score.logprobs),
        advantage=list(advantage),
        outcome=sample.outcome.value if sample.outcome.known else None,
        teacher_name=sample.score.teacher,
        kept=kept,
        visual=None if visual is None else list(visual),
        reason=sample.outcome.reason,
        answer=prompt.answer,
        key=prompt.key,
    )


def as_json(row: TokenRow) -> dict[str, Any]:
    """Return the row for `metrics.JsonLines.append`; values are rounded to 4 digits, enough for a reader."""
    data = dataclasses.asdict(row)
    numbers = [name for name in ("student", "teacher", "advantage", "visual") if data[name] is not None]
    return data | {name: [round(x, 4) for x in data[name]] for name in numbers}


def choose(responses: Sequence[Response]) -> tuple[list[Response], list[Response]]:
    """Return the responses to show first, and the others, best first.

    First come wrong, unknown and right responses of each task from the last step that has any, then those from the
    first step. Within these, responses in the loss, with a visual advantage and with large differences are preferred.
    """
    by_task: dict[str, list[Response]] = defaultdict(list)
    for response in sorted(responses, key=lambda r: (not r.row.kept, r.visual is None, -_spread(r.row))):
        by_task[response.row.task].append(response)
    first = []
    for _, of_task in sorted(by_task.items()):
        steps = {r.row.step for r in of_task}
        for step in dict.fromkeys((max(steps), min(steps))):
            at = [r for r in of_task if r.row.step == step]
            for verdict, number in FIRST.items():
                first += [r for r in at if r.row.verdict == verdict][:number]
    chosen = {id(r) for r in first}
    others = [r for r in responses if id(r) not in chosen]
    return first, sorted(others, key=lambda r: (-r.row.step, r.row.verdict != "wrong", not r.row.kept, r.row.task))


def cells(row: TokenRow) -> Iterable[Mapping[str, Any]]:
    """Yield each token for the page: text, colour from -1 (student likelier) to 1 (teacher likelier), values.

    `visual` is None if not requested; `line` is its colour, from -1 (likelier without the image) to 1 (with it).
    """
    visuals = row.visual if row.visual is not None else [None] * len(row.tokens)
    for text, student, teacher, advantage, visual in zip(
        row.tokens, row.student, row.teacher, row.advantage, visuals, strict=True
    ):
        difference = teacher - student
        yield {
            "text": visible(text[:200]),
            "breaks": text.endswith("\n"),
            "colour": _colour(difference),
            "line": _colour(visual or 0.0),
            "student": student,
            "teacher": teacher,
            "difference": difference,
            "advantage": advantage,
            "visual": visual,
        }


@contextmanager
def decoded(encoded: str) -> Iterator[tuple[bytes, Image.Image]]:
    """Give the block the bytes of a recorded image, and its pixels upright; `format` is that of the file.

    Raises:
        ValueError: the image cannot be decoded, has more than `PIXELS` pixels, or fails in the block.
    """
    try:
        data = base64.b64decode(encoded)
        with warnings.catch_warnings(action="ignore"):
            image: Image.Image = Image.open(io.BytesIO(data))
        if image.width * image.height > PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels")
        kind = image.format
        image.load()
        image = ImageOps.exif_transpose(image)
        image.format = kind
        yield data, image
    except (
        ValueError,
        OSError,
        SyntaxError,
        EOFError,
        LookupError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"cannot be decoded: {error}") from None


def picture(encoded: str) -> tuple[str, int, int]:
    """Return (data URL, width, height) of an image for the page, upright; a large image is made smaller.

    Raises:
        ValueError: as for `decoded`.
    """
    with decoded(encoded) as (data, image):
        fits = max(image.size) <= THUMBNAIL and len(data) <= HEAVY
        kind = image.format or ""
        if fits and kind in SHOWN_BY_BROWSERS:
            return _url(kind, data), image.width, image.height
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        kind = "PNG" if fits else "JPEG"
        file = io.BytesIO()
        small.save(file, format=kind, quality=85)
    return _url(kind, file.getvalue()), small.width, small.height


def _url(kind: str, data: bytes) -> str:
    return f"data:{Image.MIME[kind]};base64,{base64.b64encode(data).decode()}"


def _some(files: Files) -> Files:
    """Return some evenly spaced files, the first among them."""
    return files[:: -(-len(files) // FILES)]


def _colour(nats: float) -> float:
    return max(-1.0, min(1.0, nats / FULL_COLOUR))


def _spread(row: TokenRow) -> float:
    """Return the largest difference of a response; rows with large differences are shown first."""
    return max(abs(t - s) for t, s in zip(row.teacher, row.student, strict=True))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def visible(text: str) -> str:
    """Return the text with visible blanks and with escapes for characters that are not printable."""
    if text.strip(" \n\t") == "" and text:
        return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() or c in " \n" else c.encode("unicode_escape").decode() for c in text).replace(
        "\n", "⏎"
    )


def _texts(messages: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    for message in messages:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        yield from (part["text"] for part in parts if "text" in part)
