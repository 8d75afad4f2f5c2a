"""Encoded images, which are the files of every medium.

They are opened by their headers within bounds, sized as a person sees them, decoded and drawn as servers do it, and cut
into patches as the processor does it.

Pillow is imported when the first image is opened: every command imports this module, and few open an image.
"""

import io
from dataclasses import dataclass
from hashlib import blake2b
from threading import Lock
from typing import TYPE_CHECKING

from cachetools import LRUCache, cached

if TYPE_CHECKING:
    from PIL import Image

# Decoders of other formats may run programs.
FORMATS = {
    "PNG": "png",
    "JPEG": "jpg",
    "MPO": "mpo",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tiff",
}
# Modes whose values above 255 all become white when an image is made RGB.
DEEP = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})
MAX_RATIO = 200  # of an image's sides; the processors of Qwen-VL refuse more
MAX_SIDE = 20_000  # pixels; a larger header is refused before anything is decoded
MAX_PIXELS = 100_000_000
ORIENTATION = 0x0112  # EXIF
SIDEWAYS = frozenset({5, 6, 7, 8})  # orientations stored on their side
PNG_NOTES = frozenset({b"eXIf", b"tEXt", b"zTXt", b"iTXt"})  # chunks that may contain an orientation
PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
GREY = 128  # of 255
CACHE_BYTES = 1 << 26  # of redrawn images, which the responses of a group share


@dataclass(frozen=True, slots=True)
class PixelPolicy:
    """The rule for resizing an image and cutting it into patches."""

    patch: int
    merge: int
    min_pixels: int
    max_pixels: int

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Return the patches (1, rows, columns) of an image of this size, in pixels.

        Raises:
            ValueError: one side is more than 200 times the other.
        """
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize  # seconds, with torch

        rows, columns = smart_resize(height, width, self.patch * self.merge, self.min_pixels, self.max_pixels)
        return 1, rows // self.patch, columns // self.patch

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Return the visual tokens of a grid."""
        return grid[0] * grid[1] * grid[2] // self.merge**2


def open_image(data: bytes) -> "Image.Image":
    """Open an image: its header is read and checked against the bounds, its pixels are not decoded.

    Raises:
        ValueError: no image, or larger than MAX_SIDE or MAX_PIXELS.
    """
    from PIL import Image, ImageFile

    # Importing lmms-eval switches it on for the process: half an image would pass as a whole one.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image = Image.open(io.BytesIO(data))
    except Exception as error:
        raise ValueError(f"not an image that can be opened: {error}") from error
    check_size(*image.size)
    return image


def check_image(data: bytes, *, decode: bool = False) -> tuple[str, tuple[int, int]]:
    """Return (format, (width, height)) of an encoded image that student, teachers and trainer can all use, upright.

    Args:
        decode: read the pixels too, and compare their size with the header's.

    Raises:
        ValueError: no image of a known format, too large, too long and thin, animated, deeper than 8 bits, or broken.
    """
    from PIL import ImageOps

    image = open_image(data)
    form = image.format or "unknown"
    if form not in FORMATS:
        raise ValueError(f"format {form}; known are {', '.join(FORMATS)}")
    if image.mode in DEEP:
        raise ValueError(f"pixels of mode {image.mode}, deeper than 8 bits; save it with 8")
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ValueError(f"{image.size[0]} x {image.size[1]} pixels; at most {MAX_RATIO} times as long as wide")
    try:
        # A phone's photo has its depth map in a second frame.
        frames = 1 if form == "MPO" else getattr(image, "n_frames", 1)
        size = size_of(image)
        if decode:
            ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # a decoder may raise anything on broken data
        raise ValueError(f"its pixels cannot be read: {type(error).__name__}: {error}") from None
    if frames > 1:
        raise ValueError(f"{frames} frames; take one of them")
    if decode and image.size != size:
        raise ValueError(f"its header gives {size} pixels, and it decodes to {image.size}; save it again")
    return form, size


def check_size(width: int, height: int) -> None:
    """Raise ValueError if an image of this size, in pixels, is too large to be decoded."""
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(f"image of {width} x {height} pixels; at most {MAX_SIDE} a side and {MAX_PIXELS} in all")


def size_of(image: "Image.Image") -> tuple[int, int]:
    """Return (width, height) as a person sees it and a server reads it, from the header: turned upright by EXIF.

    Raises:
        ValueError: its notes on orientation are broken.
    """
    width, height = image.size
    if image.format == "PNG" and not _has_notes(image):
        return width, height
    try:
        # Pillow's size of a TIFF is upright already, if the orientation is a tag of the TIFF and not a note in XMP.
        turned = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(ORIENTATION) in SIDEWAYS
        sideways = image.getexif().get(ORIENTATION) in SIDEWAYS
    except Exception as error:  # a parser may raise anything on broken data
        raise ValueError(f"its EXIF cannot be read: {type(error).__name__}: {error}") from None
    return (height, width) if sideways and not turned else (width, height)


def _has_notes(image: "Image.Image") -> bool:
    """Return true if a PNG may contain an orientation.

    Pillow would decode all of its pixels to find out, because these chunks may follow them.
    """
    from PIL import ImageFile

    assert isinstance(image, ImageFile.ImageFile)
    assert isinstance(image.fp, io.BytesIO)
    data = image.fp.getbuffer()
    at = 8
    while at < len(data):
        if bytes(data[at + 4 : at + 8]) in PNG_NOTES:
            return True
        at += 12 + int.from_bytes(data[at : at + 4], "big")  # length, kind, content, checksum
    return False


def to_rgb(image: "Image.Image") -> "Image.Image":
    """Return the pixels as vLLM makes them: upright, transparency painted on white. `image` itself is turned upright.

    Raises:
        OSError: the file ends before its pixels do, or they are damaged.
    """
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(image, in_place=True)  # without in_place it copies upright images too
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        alpha = image.convert("RGBA")
        white = Image.new("RGBA", alpha.size, "white")
        image = Image.alpha_composite(white, alpha)
    return image.convert("RGB")


def _key(image: bytes | None, size: tuple[int, int]) -> tuple[bytes | None, tuple[int, int]]:
    return (None if image is None else blake2b(image, digest_size=16).digest()), size


@cached(LRUCache(CACHE_BYTES, getsizeof=len), key=_key, lock=Lock())
def draw(image: bytes | None, size: tuple[int, int]) -> bytes:
    """Make a PNG of this (width, height): the image, upright and resized as Qwen's processor does; grey without one."""
    from PIL import Image

    drawn = (
        Image.new("L", size, GREY)
        if image is None
        else to_rgb(open_image(image)).resize(size, Image.Resampling.BICUBIC)
    )
    return write_png(drawn)


def write_png(image: "Image.Image") -> bytes:
    """Return the image as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # lossless at every level; the smallest files take ten times as long
    return file.getvalue()


def encode_upright(image: "Image.Image") -> bytes:
    """Return an image in memory as the bytes of a PNG file, turned upright by its EXIF orientation.

    Raises:
        ValueError: its mode has no equal of 8 bits.
        OSError: it is a file that ends before its pixels do, or they are damaged.
    """
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(image)
    if upright.mode in DEEP:
        raise ValueError(f"pixels of mode {upright.mode}, deeper than 8 bits; save it with 8")
    if upright.mode not in PNG_MODES:
        upright = upright.convert({"PA": "RGBA", "RGBa": "RGBA", "La": "LA"}.get(upright.mode, "RGB"))
    return write_png(upright)
