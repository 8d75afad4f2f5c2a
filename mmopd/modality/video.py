"""Clips: a sequence of frames as ids, patches and JSON. Everything specific to video is in this file.

A clip is a tuple of encoded images (PNG, JPEG, ...), `FPS` of them per second: no video is decoded anywhere, so that
student, teachers and trainer see the same pixels. The arithmetic is that of Qwen3-VL's processor, which vLLM runs too:
frames are merged in pairs; each pair becomes the mean of its times, `<0.2 seconds>`, and one grid of visual tokens
between the tokens that begin and end vision.
"""

import base64
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmopd.modality.base import Medium, Reader
from mmopd.modality.pixels import PixelPolicy, check_image, draw, open_image, size_of, to_rgb
from mmopd.records import Files, Grid

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Qwen3VLProcessor

FPS = 2  # Qwen-VL's own rate; servers get it in `io_settings`, and no request can change it
MIN_FRAMES = 2  # of a clip; Qwen3-VL's limits
MAX_FRAMES = 768
MIN_SIDE = 4  # pixels; transformers would mistake a height of 1 or 3 for the colour channels
MAX_FRAME_PIXELS = 4096 * 2304
MAX_CLIP_PIXELS = 1 << 28  # of all frames together: 0.8 GB when decoded


def clip_size(frames: Sequence[bytes]) -> tuple[int, int]:
    """Return (width, height) of each frame of a clip, in pixels, from headers alone.

    Raises:
        ValueError: too few or too many frames, one that is no image, too small or too large, or frames of different
            sizes.
    """
    if not MIN_FRAMES <= len(frames) <= MAX_FRAMES:
        raise ValueError(f"{len(frames)} frames; a clip has {MIN_FRAMES} to {MAX_FRAMES}, {FPS} a second")
    first = width, height = _frame_size(frames, 0)
    if min(first) < MIN_SIDE or width * height > MAX_FRAME_PIXELS or width * height * len(frames) > MAX_CLIP_PIXELS:
        limits = f"at least {MIN_SIDE} a side, at most {MAX_FRAME_PIXELS:,} pixels each and {MAX_CLIP_PIXELS:,} in all"
        raise ValueError(f"{len(frames)} frames of {width} x {height} pixels; {limits}")
    for i in range(1, len(frames)):
        if (other := _frame_size(frames, i)) != first:
            raise ValueError(
                f"frame {i} has {other[0]} x {other[1]} pixels, and frame 0 {width} x {height}: make them alike"
            )
    return first


def _frame_size(frames: Sequence[bytes], i: int) -> tuple[int, int]:
    try:
        return size_of(open_image(frames[i]))
    except ValueError as error:
        raise ValueError(f"frame {i}: {error}") from error


@dataclass(frozen=True, slots=True)
class VideoPolicy:
    """The rule for resizing frames and cutting them into patches of `temporal` frames."""

    patch: int
    merge: int
    temporal: int
    min_pixels: int  # of all frames together
    max_pixels: int
    frame_tokens: int | None  # visual tokens of a frame, at most; None = no such limit

    def grid(self, frames: int, width: int, height: int) -> Grid:
        """Return the patches of a clip of frames of this size, in pixels.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

        unit = self.patch * self.merge
        most = self.max_pixels
        if self.frame_tokens is not None:
            most = frames * max(min(self.frame_tokens * unit**2, most // frames), int(self.min_pixels * 1.05))
        rows, columns = smart_resize(frames, height, width, self.temporal, unit, self.min_pixels, most)
        return -(-frames // self.temporal), rows // self.patch, columns // self.patch

    def tokens(self, grid: Grid) -> int:
        """Return the visual tokens of a grid, over all times."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def seconds(self, frames: int) -> list[float]:
        """Return the time of each row of the grid: the mean of its first and last frame.

        The last frame is repeated to fill a row.
        """
        starts = range(0, frames, self.temporal)
        return [(start + min(start + self.temporal, frames) - 1) / 2 / FPS for start in starts]


class ClipReader(Reader):
    """Turns clips into ids and patches with a model's own processor.

    Attributes:
        policy: how they are resized.
    """

    def __init__(self, processor: "Qwen3VLProcessor") -> None:
        self._tokenizer: Any = processor.tokenizer
        self._processor: Any = processor.video_processor
        own = self._processor
        cap = own.max_video_tokens if own.cap_pixels_per_frame else None
        edges = own.size["shortest_edge"], own.size["longest_edge"]
        self.policy = VideoPolicy(own.patch_size, own.merge_size, own.temporal_patch_size, *edges, cap)
        self.token: int = processor.video_token_id
        self._begin: int = processor.vision_start_token_id
        self._end: int = processor.vision_end_token_id

    def grid(self, files: Files, budget: PixelPolicy | None = None) -> Grid:
        """See `Reader`; the bounds are those of `clip_size`, and a budget for images has no effect."""
        return self.policy.grid(len(files), *clip_size(files))

    def tokens(self, grid: Grid) -> int:
        """See `Reader`; the count is over all times."""
        return self.policy.tokens(grid)

    def expand(self, files: Files, grid: Grid) -> Sequence[int]:
        """Return the text and the visual tokens of each time of the grid."""
        pads = [self._begin, *[self.token] * (self.policy.tokens(grid) // grid[0]), self._end]
        expanded: list[int] = []
        for second in self.policy.seconds(len(files)):
            expanded += [*self._tokenizer.encode(f"<{second:.1f} seconds>", add_special_tokens=False), *pads]
        return expanded

    def pixel_values(self, items: Sequence[Files], grids: Sequence[Grid]) -> "list[Tensor]":
        """See `Reader`; returns one tensor per clip."""
        return [self._patches(frames, grid) for frames, grid in zip(items, grids, strict=True)]

    def _patches(self, frames: Files, grid: Grid) -> "Tensor":
        import numpy as np
        import torch

        pixels = torch.stack(
            [torch.from_numpy(np.array(to_rgb(open_image(frame)))).permute(2, 0, 1) for frame in frames]
        )
        capped = self.policy.frame_tokens is not None
        said = {"do_sample_frames": False, "input_data_format": "channels_first", "cap_pixels_per_frame": capped}
        batch = self._processor([pixels], **said, return_tensors="pt")
        if batch["video_grid_thw"].tolist() != [list(grid)]:
            raise ValueError(f"processor grid {batch['video_grid_thw'].tolist()}, counted {grid}")
        patches: Tensor = batch["pixel_values_videos"]
        return patches


class VideoMedium(Medium):
    """Clips."""

    name: ClassVar[str] = "video"
    item: ClassVar[str] = "clip"
    items: ClassVar[str] = "clips"
    files: ClassVar[str] = "frames"
    slot: ClassVar[str] = "video"
    placeholder: ClassVar[str] = "<|video_pad|>"
    token_type: ClassVar[int] = 2
    pattern: ClassVar[str] = r"clip(?P<item>\d+)\.(?P<file>\d+)\.\w+"
    member_form: ClassVar[str] = "clipNUMBER.NUMBER.FORMAT"
    counts: ClassVar[str | None] = "frames"
    limit: ClassVar[str | None] = "videos"
    io_settings: ClassVar[Mapping[str, Any]] = {"fps": FPS, "num_frames": -1}  # all frames, at our rate
    differs: ClassVar[str] = "at other times"

    def member(self, item: int, file: int) -> str:
        """See `Medium`."""
        return f"clip{item}.{file:03d}"

    def check(self, files: Files, *, decode: bool = False) -> list[tuple[str, tuple[int, int]]]:
        """See `Medium`."""
        clip_size(files)
        found = []
        for i, frame in enumerate(files):
            try:
                found.append(check_image(frame, decode=decode))
            except ValueError as error:
                raise ValueError(f"frame {i}: {error}") from None
        return found

    def reader(self, processor: Any) -> Reader:
        """See `Medium`."""
        from transformers import Qwen3VLProcessor

        if not isinstance(processor, Qwen3VLProcessor):
            raise ValueError(
                f"clips need the processor of Qwen3-VL or Qwen3.5, and this one is {type(processor).__name__}"
            )
        return ClipReader(processor)

    def url(self, files: Files) -> bytes:
        """See `Medium`; no video decoder is needed, as vLLM reads each frame's format from its bytes."""
        return b"data:video/jpeg;base64," + b",".join(map(base64.b64encode, files))

    def redraw(self, files: Files, budget: PixelPolicy | None, *, blank: bool) -> Files:
        """See `Medium`; a clip has no pixel budget, so this only makes it blank."""
        if budget is not None:
            raise ValueError(
                "a pixel budget is for images, and the prompt has a clip; give clips a route with another view"
            )
        assert blank
        return (draw(None, clip_size(files)),) * len(files)

    def shuffled(self, files: Files, seed: int) -> Files:
        """Return the same frames in another order; a clip in which nothing changes stays the same."""
        rng = random.Random(seed)
        other = files
        while other == files and len(set(files)) > 1:
            other = tuple(rng.sample(files, len(files)))
        return other

    def awkward(self, pixels: PixelPolicy) -> dict[str, tuple[int, int, int]]:
        """Return an odd number of frames, and more frames than the 32 that vLLM reads by default."""
        unit = pixels.patch * pixels.merge
        return {"odd clip": (5, 3 * unit + 5, 2 * unit + 3), "long clip": (35, unit, unit)}
