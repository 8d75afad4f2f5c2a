"""Prompts as token ids: the chat template, and how many visual tokens an image becomes.

The arithmetic is that of the processor which trainer and servers run (transformers; qwen-vl-utils rounds thin images to other
sizes), on image headers alone; pixels are decoded only where a trainer needs them. Servers expand placeholders themselves; their
answer is compared with `Encoded.expanded`.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageFile, ImageOps
from transformers import AutoProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from mmopd.errors import UserError
from mmopd.records import Encoded, Prompt

MAX_SIDE = 20_000  # pixels; a larger header is refused before anything is decoded
MAX_PIXELS = 100_000_000
ORIENTATION, SIDEWAYS = 0x0112, frozenset({5, 6, 7, 8})  # EXIF: stored lying on its side
PNG_NOTES = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})  # chunks that an orientation may stand in
CONTROL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


@dataclass(frozen=True, slots=True)
class PixelPolicy:
    """How an image is resized and cut into patches."""

    patch: int
    merge: int
    min_pixels: int
    max_pixels: int

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Patches (1, rows, columns) of an image of this size, in pixels.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        rows, columns = smart_resize(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)
        return 1, rows // self.patch, columns // self.patch

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Visual tokens of a grid."""
        return grid[0] * grid[1] * grid[2] // self.merge**2


def open_image(data: bytes) -> Image.Image:
    """The image, header read and bounded, pixels not decoded.

    Raises:
        ValueError: no image, or larger than MAX_SIDE or MAX_PIXELS.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # importing lmms-eval switches it on for the process: half an image would be whole
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:
        raise ValueError(f"not an image that can be opened: {error}") from error
    check_size(*image.size)
    return image


def check_size(width: int, height: int) -> None:
    """Raise ValueError if an image of this size, in pixels, is too large to be decoded."""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(f"image of {width} x {height} pixels; at most {MAX_SIDE} a side and {MAX_PIXELS} in all")


def size_of(image: Image.Image) -> tuple[int, int]:
    """(width, height) as a person sees it and a server reads it, from the header alone: turned upright by EXIF."""
    width, height = image.size
    if image.format == "PNG" and not _has_notes(image):
        return width, height
    return (height, width) if image.getexif().get(ORIENTATION) in SIDEWAYS else (width, height)


def _has_notes(image: Image.Image) -> bool:
    """Whether a PNG may say an orientation: to find out, Pillow would decode all of its pixels, since notes may follow them."""
    assert isinstance(image, ImageFile.ImageFile)
    assert isinstance(image.fp, io.BytesIO)
    data, at = image.fp.getbuffer(), 8
    while at < len(data):
        if bytes(data[at + 4 : at + 8]) in PNG_NOTES:
            return True
        at += 12 + int.from_bytes(data[at : at + 4], "big")  # length, kind, content, checksum
    return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Pixels as vLLM makes them of a file: upright, transparency painted on white. `image` itself is turned upright.

    Raises:
        OSError: the file ends before its pixels do, or they are damaged.
    """
    ImageOps.exif_transpose(image, in_place=True)  # not in place it copies what needs no turning, too
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        alpha = image.convert("RGBA")
        white = Image.new("RGBA", alpha.size, "white")
        image = Image.alpha_composite(white, alpha)
    return image.convert("RGB")


class Encoder:
    """Turns prompts into ids and pixels with the student's own processor.

    Args:
        model: HF folder with processor, tokenizer and chat template.
    """

    def __init__(self, model: Path) -> None:
        try:
            self.processor: Any = AutoProcessor.from_pretrained(model)
        except Exception as error:
            raise UserError(f"{model}: no processor can be loaded from this folder: {error}") from error
        self.tokenizer: Any = self.processor.tokenizer
        images = self.processor.image_processor
        self.pixels = PixelPolicy(images.patch_size, images.merge_size, images.size["shortest_edge"], images.size["longest_edge"])
        self.image_token: int = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        vocabulary = self.tokenizer.get_vocab()
        self.banned: tuple[int, ...] = tuple(vocabulary[t] for t in CONTROL_TOKENS if t in vocabulary)

    def encode(self, prompt: Prompt, pixels: PixelPolicy | None = None) -> Encoded:
        """Ids of the prompt up to and with the assistant's header.

        Args:
            pixels: the budget that images are resized to, if it is not the student's.

        Raises:
            ValueError: an image that cannot be opened, or more or fewer images than placeholders.
        """
        text = self.processor.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        if ids.count(self.image_token) != len(prompt.images):
            raise ValueError(f"{prompt.key}: {ids.count(self.image_token)} image placeholders for {len(prompt.images)} images")
        grids = tuple((pixels or self.pixels).grid(*size_of(open_image(data))) for data in prompt.images)
        return Encoded(prompt, tuple(ids), self.expand(ids, grids), grids)

    def expand(self, ids: list[int], grids: tuple[tuple[int, int, int], ...]) -> tuple[int, ...]:
        """Each placeholder repeated once per visual token of its image."""
        expanded: list[int] = []
        waiting = iter(grids)
        for i in ids:
            expanded += [i] * (self.pixels.tokens(next(waiting)) if i == self.image_token else 1)
        return tuple(expanded)

    def decode(self, tokens: tuple[int, ...]) -> str:
        """Text of response tokens, control tokens left out."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def pixel_values(self, encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixels [patches, channels * time * patch * patch], grids [I, 3]) of the prompt's images.

        Raises:
            ValueError: the processor cuts an image into another grid than `encode` counted.
        """
        images = [to_rgb(open_image(data)) for data in encoded.prompt.images]
        batch = self.processor.image_processor(images=images, return_tensors="pt")
        grids: torch.Tensor = batch["image_grid_thw"]
        if grids.tolist() != [list(g) for g in encoded.grids]:
            raise ValueError(f"{encoded.prompt.key}: processor grids {grids.tolist()}, counted {encoded.grids}")
        return batch["pixel_values"], grids
