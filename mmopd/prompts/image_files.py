"""Encoded images from the values of a data set: bytes, paths, data URLs, base64, records of the hub."""

import base64
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mmopd.modality.pixels import encode_upright
from mmopd.prompts.rows import RowError

MAX_FILE = 1 << 26  # bytes of an image file
MAX_NAME = 500  # characters of a path in a message
SHOWN = 60  # characters of anything longer
URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
# First bytes of PNG, JPEG, GIF, WebP, BMP and TIFF files.
STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")


def encoded(value: Any, top: Path, start: Path) -> bytes:
    """Return the bytes of an image file; an image in memory becomes a PNG. Nothing is fetched.

    Args:
        value: bytes, a path, a data URL, base64, a record as the hub stores it, or an image in memory.
        top: folder out of which no path may lead.
        start: folder in which paths start.

    Raises:
        RowError: it is none of these, or the file cannot be read.
    """
    if isinstance(value, Mapping):  # as the hub stores an image
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return _of_text(value, top, start)
    if isinstance(value, Image.Image):
        try:
            return encode_upright(value)
        except (ValueError, OSError) as error:
            raise RowError("bad image", str(error)) from None
    raise RowError("bad image", f"{type(value).__name__} is neither an encoded image nor a path")


def _of_text(text: str, top: Path, start: Path) -> bytes:
    if text.startswith("data:"):
        return _decoded(text)
    if text.startswith("file://"):
        return _read_file(top, start, text.removeprefix("file://"))
    if URL.match(text):
        raise RowError("image by URL", f"{text[:SHOWN]!r}: images are not fetched; download them, and give their paths")
    if BASE64.fullmatch(text):
        try:
            data = base64.b64decode("".join(text.split()), validate=True)
        except ValueError:
            data = b""
        if data.startswith(STARTS):
            return data
    return _read_file(top, start, text)


def _decoded(url: str) -> bytes:
    head, _, content = url.partition(",")
    if not head.endswith(";base64"):
        raise RowError("bad image", f"{url[:SHOWN]!r}: a data URL must be base64")
    try:
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise RowError("bad image", f"{url[:SHOWN]!r}: a data URL that is not base64: {error}") from None


def _read_file(top: Path, start: Path, name: str) -> bytes:
    """Return the content of an image file in a folder; a pipe or a device might never end."""
    path = start / name
    shown = str(path) if len(name) <= MAX_NAME else f"{name[:SHOWN]!r}... ({len(name):,} characters, and no data URL)"
    try:
        resolved = path.resolve()
        if not resolved.is_relative_to(top.resolve()):
            raise RowError("outside of the data", f"{shown}: outside of {top}; set `root` to a folder above it")
        about = resolved.stat()
        if not stat.S_ISREG(about.st_mode):
            raise RowError("no image file", f"{shown}: not a file")
        if about.st_size > MAX_FILE:
            raise RowError("bad image", f"{shown}: more than {MAX_FILE} bytes")
        return resolved.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:  # a null character, links in a circle
        raise RowError("no image file", f"{shown}: {getattr(error, 'strerror', None) or error}") from None
