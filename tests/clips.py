"""Tiny clips for tests: a moving square, prompts about it, and the log-probs of transformers for them."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmopd.demo.world import additions, digit_sums
from mmopd.modality import Encoder
from mmopd.prompts import Shards
from mmopd.prompts.prepare import prepare
from mmopd.records import Encoded, Prompt

QUESTION = "Which way does the square move? (A) left (B) right"
# (frames, width, height)
SHAPES = [(2, 64, 32), (3, 64, 64), (5, 37, 91), (8, 64, 64), (9, 200, 180), (35, 32, 32), (4, 20, 20), (4, 300, 8)]
CONVERTER = """
import io

from PIL import Image

from mmopd.prompts.convert import SourceSettings


class Settings(SourceSettings):
    data: str = "made here"
    task: str = "video_choice"


def examples(settings):
    return [(i, n) for i, n in enumerate([4, 5, 6, 7])]


def frame(x):
    image, file = Image.new("RGB", (64, 32), "black"), io.BytesIO()
    image.paste((255, 255, 255), (x, 8, x + 16, 24))
    image.save(file, "PNG")
    return file.getvalue()


def convert(example, settings, task):
    i, n = example
    clip = [frame(6 * t) for t in range(n)]
    if i % 2:
        clip.reverse()
    return task.prompt("", "Which way does the square move? (A) left (B) right", "AB"[i % 2 == 0], videos=[clip])
"""


def frame(width: int, height: int, x: int, form: str = "PNG") -> bytes:
    """Draw a bright square at x, next to a pattern whose places all differ."""
    pixels = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)[..., None] % 90 + np.array([0, 40, 80])
    side = max(2, height // 3)
    pixels[height // 3 : height // 3 + side, x % width : x % width + side] = 250
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, form)
    return file.getvalue()


def clip(frames: int, width: int = 64, height: int = 32, *, step: int = 7, form: str = "PNG") -> tuple[bytes, ...]:
    return tuple(frame(width, height, step * i, form) for i in range(frames))


def prompt(*clips: Sequence[bytes], images: Sequence[bytes] = (), key: str = "v/0") -> Prompt:
    parts = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(clips)
    messages = ({"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]},)
    return Prompt(
        key,
        "video_choice",
        "video",
        messages,
        tuple(images),
        "B",
        {"caption": "It moves."},
        {"video": tuple(map(tuple, clips))},
    )


def still(world: Any, modality: str) -> Prompt:
    """Return a prompt of the demo: an image, or text alone."""
    row = world("few", 1, 0)[0]
    return Prompt(f"{modality}/0", "demo", modality, tuple(row["messages"]), tuple(row["images"]), row["answer"])


MIXED = {
    **{
        f"{frames} of {width}x{height}": prompt(clip(frames, width, height), key=f"v/{frames}-{height}")
        for frames, width, height in SHAPES
    },
    "two clips": prompt(clip(3), clip(4, 40, 70), key="v/two"),
    "an image and a clip": prompt(clip(5), images=[frame(70, 50, 3)], key="v/image"),
    "JPEG": prompt(clip(4, form="JPEG"), key="v/jpeg"),
    "image": still(digit_sums, "image"),
    "text": still(additions, "text"),
}


def write_films(folder: Path, processor: Path) -> Shards:
    """Write four clips of a moving square with `mmopd prepare` and a converter."""
    (folder / "films.py").write_text(CONVERTER, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shards, count = prepare(folder / "films.py", folder / "shards", processor=processor, max_rows=3)
    assert (count.rows, count.left_out) == (4, {})
    return shards


def of_transformers(model: Any, encoder: Encoder, encoded: Encoded, tokens: Sequence[int]) -> list[float]:
    """Return the log-probs of the model as transformers runs it, one prompt at a time."""
    ids = torch.tensor([[*encoded.expanded, *tokens]])
    kinds = (ids == encoder.tokens["image"]).int() + 2 * (ids == encoder.tokens["video"]).int()
    seen: dict[str, Any] = {}
    if encoded.prompt.is_visual:
        patches, grids = encoder.pixel_values(encoded)
        rows = len(encoded.prompt.images)
        images = sum(t * h * w for t, h, w in encoded.grids[:rows])
        seen |= {"pixel_values": patches[:images], "image_grid_thw": grids[:rows]} if rows else {}
        seen |= {"pixel_values_videos": patches[images:], "video_grid_thw": grids[rows:]} if len(grids) > rows else {}
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **seen).logits[0]
    rows = logits[len(encoded.expanded) - 1 : -1].log_softmax(-1)
    return [row[token].item() for row, token in zip(rows, tokens, strict=True)]
