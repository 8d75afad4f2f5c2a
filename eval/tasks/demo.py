"""The functions of the demo's lmms-eval tasks: the images and the question of a row, and the score of an answer."""

import io
from typing import Any

from PIL import Image

from mmopd.task import verify


def images(row: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(row["image"])).convert("RGB")] if row["image"] else []


def question(row: dict[str, Any]) -> str:
    return str(row["question"])


def score(row: dict[str, Any], responses: list[str]) -> dict[str, float]:
    """Score an answer with the verifier used in training; NaN, which fails the benchmark, if the key is no number."""
    return {"accuracy": verify.number_after_equals(responses[0], row["answer"]).value}
