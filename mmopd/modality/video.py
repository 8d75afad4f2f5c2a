"""Clips: what a sequence of frames becomes as ids, patches and JSON. All that is particular to video is here.

A clip is a tuple of encoded images (PNG, JPEG, ...), `FPS` of them a second: no video is decoded anywhere, so that
student, teachers and trainer see the same pixels. The arithmetic is that of Qwen3-VL's processor, which vLLM runs too:
frames are merged in twos; each two become the mean of their times, `<0.2 seconds>`, and one grid of visual tokens
between the tokens that begin and end vision.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmopd.modality.image import open_image, size_of, to_rgb

if TYPE_CHECKING:  # torch and transformers take seconds, and limits and sizes need neither
    from torch import Tensor
    from transformers import Qwen3VLProcessor

FPS = 2  # Qwen-VL's own rate; servers are told by MEDIA_SETTINGS, and no request can say otherwise
MIN_FRAMES, MAX_FRAMES = 2, 768  # of a clip; what Qwen3-VL takes
MIN_SIDE = 4  # pixels; transformers takes a height of 1 or 3 for the colours
MAX_FRAME_PIXELS = 4096 * 2304
MAX_CLIP_PIXELS = 1 << 28  # of all frames together: 0.8 GB when they are decoded
MEDIA_SETTINGS = {"video": {"fps": FPS, "num_frames": -1}}  # of vLLM's --media-io-kwargs: all frames, at our rate

Grid = tuple[int, int, int]  # (time, rows, columns), in patches


def clip_size(frames: Sequence[bytes]) -> tuple[int, int]:
    """(width, height) of each frame of a clip, in pixels, from headers alone.

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


def data_url(frames: Sequence[bytes]) -> bytes:
    """A clip as vLLM takes it without a video decoder; it reads the kind of each frame from its bytes, not from the
    media type.
    """
    return b"data:video/jpeg;base64," + b",".join(map(base64.b64encode, frames))


@dataclass(frozen=True, slots=True)
class VideoPolicy:
    """How frames are resized, and cut into patches of `temporal` frames."""

    patch: int
    merge: int
    temporal: int
    min_pixels: int  # of all frames together
    max_pixels: int
    frame_tokens: int | None  # visual tokens of a frame, at most; None = no such limit

    def grid(self, frames: int, width: int, height: int) -> Grid:
        """Patches of a clip of frames of this size, in pixels.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

        unit, most = self.patch * self.merge, self.max_pixels
        if self.frame_tokens is not None:
            most = frames * max(min(self.frame_tokens * unit**2, most // frames), int(self.min_pixels * 1.05))
        rows, columns = smart_resize(frames, height, width, self.temporal, unit, self.min_pixels, most)
        return -(-frames // self.temporal), rows // self.patch, columns // self.patch

    def tokens(self, grid: Grid) -> int:
        """Visual tokens of a grid, all times together."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def seconds(self, frames: int) -> list[float]:
        """The time of each row of the grid: the mean of its first and last frame. The last frame is repeated to fill
        one.
        """
        starts = range(0, frames, self.temporal)
        return [(start + min(start + self.temporal, frames) - 1) / 2 / FPS for start in starts]


class Clips:
    """Turns clips into ids and patches with a model's own processor.

    Attributes:
        policy: how they are resized.
        token: the id that stands for a clip in a prompt, and for each of its visual tokens.
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

    def grid(self, frames: Sequence[bytes]) -> Grid:
        """Patches of a clip, from the headers of its frames.

        Raises:
            ValueError: as `clip_size`.
        """
        return self.policy.grid(len(frames), *clip_size(frames))

    def expand(self, frames: int, grid: Grid) -> list[int]:
        """What the placeholder of a clip becomes: for each time of the grid its text, and its visual tokens."""
        pads = [self._begin, *[self.token] * (self.policy.tokens(grid) // grid[0]), self._end]
        expanded: list[int] = []
        for second in self.policy.seconds(frames):
            expanded += [*self._tokenizer.encode(f"<{second:.1f} seconds>", add_special_tokens=False), *pads]
        return expanded

    def pixel_values(self, frames: Sequence[bytes], grid: Grid) -> "Tensor":
        """[patches, channels * time * patch * patch] of a clip.

        Raises:
            ValueError: the processor cuts it into another grid.
            OSError: a frame ends before its pixels do, or they are damaged.
        """
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
