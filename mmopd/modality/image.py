"""Images: one file each, as the rows, servers and processors of every Qwen-VL take them."""

import base64
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mmopd.modality.base import Medium, Reader
from mmopd.modality.pixels import PixelPolicy, check_image, check_size, draw, open_image, size_of, to_rgb, write_png
from mmopd.records import Files, Grid

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = 4  # a shuffled image is cut into blocks of a quarter of its shorter side


class ImageReader(Reader):
    """Turns images into ids and patches with a model's own processor.

    Attributes:
        policy: how they are resized.
    """

    def __init__(self, processor: Any, token: int) -> None:
        own = processor.image_processor
        self._processor = own
        self.policy = PixelPolicy(own.patch_size, own.merge_size, own.size["shortest_edge"], own.size["longest_edge"])
        self.token = token

    def grid(self, files: Files, budget: PixelPolicy | None = None) -> Grid:
        """See `Reader`."""
        return (budget or self.policy).grid(*size_of(open_image(files[0])))

    def tokens(self, grid: Grid) -> int:
        """See `Reader`."""
        return self.policy.tokens(grid)

    def expand(self, files: Files, grid: Grid) -> Sequence[int]:
        """Return the placeholder once for each visual token."""
        return [self.token] * self.policy.tokens(grid)

    def pixel_values(self, items: Sequence[Files], grids: Sequence[Grid]) -> "list[Tensor]":
        """See `Reader`; returns one tensor, since the processor takes all images in one call."""
        images = [to_rgb(open_image(files[0])) for files in items]
        batch = self._processor(images=images, return_tensors="pt")
        if (found := batch["image_grid_thw"].tolist()) != [list(grid) for grid in grids]:
            raise ValueError(f"processor grids {found}, counted {grids}")
        return [batch["pixel_values"]]


class ImageMedium(Medium):
    """Images."""

    name: ClassVar[str] = "image"
    item: ClassVar[str] = "image"
    items: ClassVar[str] = "images"
    files: ClassVar[str] = "files"
    slot: ClassVar[str] = "image"
    placeholder: ClassVar[str] = "<|image_pad|>"
    token_type: ClassVar[int] = 1
    pattern: ClassVar[str] = r"(?P<item>\d+)(?P<file>)\.\w+"
    member_form: ClassVar[str] = "NUMBER.FORMAT"

    def member(self, item: int, file: int) -> str:
        """See `Medium`."""
        return str(item)

    def check(self, files: Files, *, decode: bool = False) -> list[tuple[str, tuple[int, int]]]:
        """See `Medium`."""
        return [check_image(files[0], decode=decode)]

    def reader(self, processor: Any) -> Reader:
        """See `Medium`."""
        return ImageReader(processor, processor.tokenizer.convert_tokens_to_ids(self.placeholder))

    def url(self, files: Files) -> bytes:
        """See `Medium`; vLLM reads the format from the bytes, not from the media type."""
        return b"data:image/*;base64," + base64.b64encode(files[0])

    def redraw(self, files: Files, budget: PixelPolicy | None, *, blank: bool) -> Files:
        """See `Medium`; an image that would not change stays the same, byte for byte."""
        image = files[0]
        size = own = size_of(open_image(image))
        if budget is not None:
            _, rows, columns = budget.grid(*own)
            size = (columns * budget.patch, rows * budget.patch)
            check_size(*size)
        if blank:
            return (draw(None, size),)
        return (image if size == own else draw(image, size),)

    def shuffled(self, files: Files, seed: int) -> Files:
        """Return the same pixels at other places: square blocks of the image, permuted.

        Pixels outside of whole blocks stay in place.
        """
        import numpy as np
        from PIL import Image

        pixels = np.array(to_rgb(open_image(files[0])))  # [height, width, 3]
        side = max(1, min(pixels.shape[:2]) // BLOCKS)
        rows = pixels.shape[0] // side
        columns = pixels.shape[1] // side
        inner = pixels[: rows * side, : columns * side]
        blocks = inner.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        blocks = blocks[np.random.default_rng(seed).permutation(len(blocks))]
        pixels[: rows * side, : columns * side] = (
            blocks.reshape(rows, columns, side, side, 3).swapaxes(1, 2).reshape(inner.shape)
        )
        return (write_png(Image.fromarray(pixels)),)

    def awkward(self, pixels: PixelPolicy) -> dict[str, tuple[int, int, int]]:
        """Return sizes that image processors with other settings resize differently."""
        unit = pixels.patch * pixels.merge
        side = math.isqrt(pixels.max_pixels) + unit
        return {
            "tiny": (1, unit // 2 + 1, unit // 2 + 1),
            "odd": (1, 3 * unit + 5, 2 * unit + 3),
            "tall": (1, unit, 6 * unit),
            "wide": (1, 6 * unit, unit),
            "over the budget": (1, side + unit, side),
        }
