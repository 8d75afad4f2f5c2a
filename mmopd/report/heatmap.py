"""Responses token by token: the log-probs of teacher and student, with the difference as a colour.

A row of `samples.jsonl` is a `TokenRow`. The report shows some of them, chosen by `choose`.
"""

import base64
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from mmopd.records import Files, Prompt, Sample, Score
from mmopd.report.metrics import read_lines

FULL_COLOUR = 3.0  # nats; one of the two gives the token a probability e^3 = 20 times higher
THUMBNAIL = 640  # pixels
FILES = 8  # number of files of an item that are shown


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

    @property
    def reward(self) -> float:
        """R, the mean over tokens of teacher minus student (Eq. 5), in nats."""
        differences = [t - s for t, s in zip(self.teacher, self.student, strict=True)]
        return sum(differences) / len(differences) if differences else math.nan

    @property
    def verdict(self) -> str:
        """Outcome in words: right | wrong | unknown | partly."""
        if self.outcome is None:
            return "unknown"
        return {1.0: "right", 0.0: "wrong"}.get(self.outcome, "partly")


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
    )


def as_json(row: TokenRow) -> dict[str, Any]:
    """Return the row for `metrics.JsonLines.append`; values are rounded to 4 digits, enough for a reader."""
    data = dataclasses.asdict(row)
    numbers = [name for name in ("student", "teacher", "advantage", "visual") if data[name] is not None]
    return data | {name: [round(x, 4) for x in data[name]] for name in numbers}


def read_rows(path: Path) -> list[TokenRow]:
    """Return the rows of `samples.jsonl`; an empty list if there is no such file."""
    return [TokenRow(**row) for row in read_lines(path)]


def choose(rows: Sequence[TokenRow], limit: int = 12) -> list[TokenRow]:
    """Return some rows: one right and one wrong response of each task, for the first and the last step that has any."""
    chosen: dict[tuple[object, ...], TokenRow] = {}
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task and row.tokens]
        for step in sorted({row.step for row in of_task})[:: max(1, len({row.step for row in of_task}) - 1)]:
            for row in sorted(
                (r for r in of_task if r.step == step), key=lambda r: (not r.kept, r.visual is None, -_spread(r))
            ):
                chosen.setdefault((task, step, row.verdict), row)
    return sorted(chosen.values(), key=lambda r: (r.step, r.task, r.verdict))[:limit]


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
            "text": _visible(text),
            "breaks": text.endswith("\n"),
            "colour": _colour(difference),
            "line": _colour(visual or 0.0),
            "student": student,
            "teacher": teacher,
            "difference": difference,
            "advantage": advantage,
            "visual": visual,
        }


def picture(encoded: str) -> tuple[str, int, int]:
    """Return (data URL, width, height) of an image for the page; large images are made smaller."""
    data = base64.b64decode(encoded)
    image: Image.Image = Image.open(io.BytesIO(data))
    kind = Image.MIME.get(image.format or "", "image/png")
    if max(image.size) > THUMBNAIL:
        image = image.convert("RGB")
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=85)
        data = file.getvalue()
        kind = "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}", image.width, image.height


def _some(files: Files) -> Files:
    """Return some evenly spaced files, the first among them."""
    return files[:: -(-len(files) // FILES)]


def _colour(nats: float) -> float:
    return max(-1.0, min(1.0, nats / FULL_COLOUR))


def _spread(row: TokenRow) -> float:
    """Return the largest difference of a response; rows with large differences are shown first."""
    return max(abs(t - s) for t, s in zip(row.teacher, row.student, strict=True))


def _visible(text: str) -> str:
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
