"""What lmms-eval asks of the demo's tasks: the image, the question, and whether an answer is right."""

import io
from typing import Any

from PIL import Image

from mmopd.task import verify


def images(row: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(row["image"])).convert("RGB")] if row["image"] else []


def question(row: dict[str, Any]) -> str:
    return str(row["question"])


def score(row: dict[str, Any], responses: list[str]) -> dict[str, float]:
    """What the verifier of the training tasks says; NaN where the answer key is no number, which fails the benchmark."""
    return {"accuracy": verify.number_after_equals(responses[0], row["answer"]).value}
