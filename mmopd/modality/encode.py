"""Prompts as token ids: the chat template, and how many visual tokens an image or a clip becomes.

The arithmetic is that of the processor which trainer and servers run (transformers; qwen-vl-utils rounds thin images to
other sizes), on image headers alone; pixels are decoded only where a trainer needs them. Servers expand placeholders
themselves; their answer is compared with `Encoded.expanded`.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, Qwen3VLProcessor

from mmopd.errors import CheckpointError
from mmopd.modality.image import PixelPolicy, open_image, size_of, to_rgb
from mmopd.modality.video import Clips, Grid
from mmopd.records import Encoded, Prompt

CONTROL_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


class Encoder:
    """Turns prompts into ids and pixels with the student's own processor.

    Args:
        model: HF folder with processor, tokenizer and chat template.
    """

    def __init__(self, model: Path) -> None:
        try:
            self.processor: Any = AutoProcessor.from_pretrained(model)
        except Exception as error:
            raise CheckpointError(f"{model}: no processor can be loaded from this folder: {error}") from error
        self.tokenizer: Any = self.processor.tokenizer
        images = self.processor.image_processor
        self.pixels = PixelPolicy(
            images.patch_size, images.merge_size, images.size["shortest_edge"], images.size["longest_edge"]
        )
        self.image_token: int = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.video_token: int = self.tokenizer.convert_tokens_to_ids("<|video_pad|>")
        vocabulary = self.tokenizer.get_vocab()
        self.banned: tuple[int, ...] = tuple(vocabulary[t] for t in CONTROL_TOKENS if t in vocabulary)

    def encode(self, prompt: Prompt, pixels: PixelPolicy | None = None) -> Encoded:
        """Ids of the prompt up to and with the assistant's header.

        Args:
            pixels: the budget that images are resized to, if it is not the student's.

        Raises:
            ValueError: an image or a clip that cannot be opened, more or fewer of them than placeholders, or a clip for
                a processor that takes none.
        """
        text = self.processor.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        if ids.count(self.image_token) != len(prompt.images):
            raise ValueError(
                f"{prompt.key}: {ids.count(self.image_token)} image placeholders for {len(prompt.images)} images"
            )
        if ids.count(self.video_token) != len(prompt.videos):
            raise ValueError(
                f"{prompt.key}: {ids.count(self.video_token)} video placeholders for {len(prompt.videos)} clips"
            )
        grids = tuple((pixels or self.pixels).grid(*size_of(open_image(data))) for data in prompt.images)
        video_grids = tuple(self.clips.grid(frames) for frames in prompt.videos)
        shown = (self.clips.expand(len(frames), grid) for frames, grid in zip(prompt.videos, video_grids, strict=True))
        return Encoded(prompt, tuple(ids), self.expand(ids, grids, shown), grids, video_grids)

    def expand(self, ids: Sequence[int], grids: Sequence[Grid], clips: Iterable[Sequence[int]] = ()) -> tuple[int, ...]:
        """Each placeholder of an image repeated once per visual token, each of a clip replaced by what it becomes."""
        expanded: list[int] = []
        waiting, playing = iter(grids), iter(clips)
        for i in ids:
            if i == self.image_token:
                expanded += [i] * self.pixels.tokens(next(waiting))
            elif i == self.video_token:
                expanded += next(playing)
            else:
                expanded.append(i)
        return tuple(expanded)

    @cached_property
    def clips(self) -> Clips:
        """What clips become.

        Raises:
            ValueError: the processor takes none.
        """
        if not isinstance(self.processor, Qwen3VLProcessor):
            raise ValueError(
                f"clips need the processor of Qwen3-VL or Qwen3.5, and this one is {type(self.processor).__name__}"
            )
        return Clips(self.processor)

    def decode(self, tokens: tuple[int, ...]) -> str:
        """Text of response tokens, control tokens left out."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def pixel_values(self, encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixels [patches, channels * time * patch * patch], grids [I, 3]) of the prompt's images, and after them of
        its clips.

        Raises:
            ValueError: the processor cuts an image or a clip into another grid than `encode` counted.
        """
        prompt = encoded.prompt
        pixels: list[torch.Tensor] = []
        if prompt.images:
            images = [to_rgb(open_image(data)) for data in prompt.images]
            batch = self.processor.image_processor(images=images, return_tensors="pt")
            if (grids := batch["image_grid_thw"].tolist()) != [list(g) for g in encoded.grids]:
                raise ValueError(f"{prompt.key}: processor grids {grids}, counted {encoded.grids}")
            pixels.append(batch["pixel_values"])
        pixels += [
            self.clips.pixel_values(frames, grid)
            for frames, grid in zip(prompt.videos, encoded.video_grids, strict=True)
        ]
        return torch.cat(pixels) if len(pixels) > 1 else pixels[0], torch.tensor([*encoded.grids, *encoded.video_grids])
