"""One row: when it is well formed, and the members that it has in a tar.

`KEY.json`, the images as `KEY.0.png`, `KEY.1.jpg`, ..., and the frames of clips as `KEY.clip0.000.png`,
`KEY.clip0.001.png`, ...
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from pydantic_core import from_json

from mmopd.errors import DataError
from mmopd.modality.image import open_image, size_of
from mmopd.modality.video import clip_size
from mmopd.records import Message, Prompt

FIELDS = ("task", "modality", "messages", "answer")  # of a row's json
FORMATS = {
    "PNG": "png",
    "JPEG": "jpg",
    "MPO": "mpo",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tiff",
}  # others may run programs
DEEP = frozenset(
    {"I", "F", "I;16", "I;16B", "I;16L", "I;16N"}
)  # modes whose values above 255 all become white when an image is made RGB
MAX_RATIO = 200  # of an image's sides: longer ones the processors of Qwen-VL refuse
MAX_TEXT = 1_000_000  # characters of a row's messages
MAX_ANSWER = 16_000_000  # characters of an answer key; unit tests are long


class RowError(DataError):
    """A row that cannot be used: left out and counted when shards are prepared, replaced and counted when they are
    read.

    Args:
        cause: short and countable.
        detail: what a person reads.
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(cause, detail)
        self.cause, self.detail = cause, detail

    def __str__(self) -> str:
        return self.detail


def pack(row: Prompt, *, decode: bool = False) -> dict[str, bytes]:
    """Extension -> content of a row.

    Args:
        decode: read the pixels of images and frames, too, and not only their headers.

    Raises:
        RowError: no messages or no text, images or clips that do not match the messages or the modality or cannot be
            used, or too much text.
    """
    if not row.messages:
        raise RowError("no messages", "it has no messages")
    _check_parts(row)
    check_text(row)
    members = {}
    for i, image in enumerate(row.images):
        try:
            members[f"{i}.{FORMATS[check_image(image, decode=decode)[0]]}"] = image
        except ValueError as error:
            raise RowError("bad image", f"image {i}: {error}") from None
    for i, frames in enumerate(row.videos):
        try:
            members |= {f"clip{i}.{name}": frame for name, frame in _name_frames(frames, decode=decode).items()}
        except ValueError as error:
            raise RowError("bad clip", f"clip {i}: {error}") from None
    fields: dict[str, object] = {
        "id": row.key,
        "task": row.task,
        "modality": row.modality,
        "messages": row.messages,
        "answer": row.answer,
    }
    fields |= {"extra": row.extra} if row.extra else {}
    fields |= {"frames": [len(frames) for frames in row.videos]} if row.videos else {}
    try:
        content = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
        parse(content)
    except (ValueError, TypeError) as error:
        raise RowError("bad field", str(error)) from None
    return {"json": content, **members}


def _check_parts(row: Prompt) -> None:
    """Images and clips are as many as the messages have places for, and are what the modality says."""
    for part, what, n in (("image", "images", len(row.images)), ("video", "clips", len(row.videos))):
        if (placeholders := count_parts(row.messages, part)) != n:
            raise RowError(f"{what} do not match", f"{placeholders} {part} parts in its messages, and {n} {what}")
    if (row.modality == "video") != bool(row.videos):
        raise RowError("clips do not match", f"{len(row.videos)} clips, and its modality is {row.modality!r}")
    if (row.modality == "text") != (not row.is_visual):
        raise RowError("images do not match", f"{len(row.images)} images, and its modality is {row.modality!r}")


def _name_frames(frames: Sequence[bytes], *, decode: bool) -> dict[str, bytes]:
    """`NUMBER.FORMAT` -> frame."""
    clip_size(frames)
    members = {}
    for i, frame in enumerate(frames):
        try:
            members[f"{i:03d}.{FORMATS[check_image(frame, decode=decode)[0]]}"] = frame
        except ValueError as error:
            raise ValueError(f"frame {i}: {error}") from None
    return members


def unpack(key: str, content: bytes, files: Sequence[bytes]) -> Prompt:
    """The prompt of a row's json and of its files: the images, then the frames of each clip.

    Raises:
        ValueError: not the json of a row, or more or fewer frames than it says.
    """
    data = parse(content)
    images, videos = _split(files, data["frames"]) if "frames" in data else (tuple(files), ())
    return Prompt(
        key,
        data["task"],
        data["modality"],
        tuple(data["messages"]),
        images,
        data["answer"],
        data.get("extra", {}),
        videos,
    )


def _split(files: Sequence[bytes], counts: Sequence[int]) -> tuple[tuple[bytes, ...], tuple[tuple[bytes, ...], ...]]:
    """The images, then as many frames for each clip as `counts` says."""
    if (images := len(files) - sum(counts)) < 0:
        raise ValueError(f"it has {len(files)} files, and its json says {sum(counts)} frames")
    return tuple(files[:images]), tuple(tuple(files[a:b]) for a, b in pairwise(accumulate(counts, initial=images)))


def parse(content: bytes) -> dict[str, Any]:
    """The fields of a row's json.

    Raises:
        ValueError: not json, or a field is missing or of another type.
    """
    row = from_json(content)
    if not isinstance(row, dict):
        raise ValueError(f"its json is {type(row).__name__}, not an object")
    for field in FIELDS:
        if not isinstance(row.get(field), list if field == "messages" else str):
            raise ValueError(
                f"its json has {row[field]!r} as {field!r}" if field in row else f"its json has no {field!r}"
            )
    frames = row.get("frames", [])  # of each clip
    if not isinstance(frames, list) or not all(isinstance(count, int) and count > 0 for count in frames):
        raise ValueError(f"its json has {frames!r} as 'frames'; needed is how many each clip has")
    return row


def check_text(row: Prompt) -> None:
    """Refuse a row that asks nothing, or that no model could read.

    Raises:
        RowError: no text, or too much of it.
    """
    text = sum(len(part) for part in texts(row.messages))
    if not any(part.strip() for part in texts(row.messages)):
        raise RowError("no text", "there is no text in its messages")
    if text > MAX_TEXT:
        raise RowError("text too long", f"{text:,} characters of text; at most {MAX_TEXT:,}")
    if isinstance(row.answer, str) and len(row.answer) > MAX_ANSWER:
        raise RowError("answer too long", f"an answer key of {len(row.answer):,} characters; at most {MAX_ANSWER:,}")


def check_image(data: bytes, *, decode: bool = False) -> tuple[str, tuple[int, int]]:
    """(format, (width, height)) of an encoded image that student, teachers and trainer can use alike; turned upright.

    Args:
        decode: read the pixels, too.

    Raises:
        ValueError: no image of a known format, too large, too long and thin, animated, deeper than 8 bits, or broken.
    """
    image = open_image(data)
    form = image.format or "unknown"
    if form not in FORMATS:
        raise ValueError(f"format {form}; known are {', '.join(FORMATS)}")
    if image.mode in DEEP:
        raise ValueError(f"pixels of mode {image.mode}, deeper than 8 bits; save it with 8")
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ValueError(f"{image.size[0]} x {image.size[1]} pixels; at most {MAX_RATIO} times as long as wide")
    try:
        frames = (
            1 if form == "MPO" else getattr(image, "n_frames", 1)
        )  # a phone's photo has its depth in a second frame
        size = size_of(image)
        if decode:
            image.load()
    except Exception as error:  # whatever a decoder does with broken data
        raise ValueError(f"its pixels cannot be read: {type(error).__name__}: {error}") from None
    if frames > 1:
        raise ValueError(f"{frames} frames; take one of them")
    return form, size


def count_parts(messages: Iterable[Message], kind: str) -> int:
    """Parts of a kind, such as image, in the messages of a chat."""
    return sum(part.get("type") == kind for part in _parts(messages))


def texts(messages: Iterable[Message]) -> list[str]:
    """The texts in the messages of a chat."""
    messages = list(messages)
    whole = [content for message in messages if isinstance(content := message.get("content"), str)]
    return whole + [text for part in _parts(messages) if isinstance(text := part.get("text"), str)]


def _parts(messages: Iterable[Message]) -> list[Mapping[str, Any]]:
    contents = (message.get("content") for message in messages if isinstance(message, Mapping))
    return [
        part
        for content in contents
        if isinstance(content, list | tuple)
        for part in content
        if isinstance(part, Mapping)
    ]
