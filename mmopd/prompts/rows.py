"""One row: the rules for a well-formed row, and its members in a tar.

`KEY.json`, and the files of each medium under its own names: images are `KEY.0.png`, `KEY.1.jpg`, ...
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from pydantic_core import from_json

from mmopd.errors import DataError
from mmopd.modality.base import Medium
from mmopd.modality.pixels import FORMATS
from mmopd.modality.registry import MEDIA
from mmopd.records import Files, Message, Prompt

FIELDS = ("task", "modality", "messages", "answer")  # required fields of a row's json
ROLES = ("system", "user", "assistant", "tool")
MAX_TEXT = 1_000_000  # characters of a row's messages
MEDIA_KEYS = frozenset({"image", "image_url", "video"})
SHOWN = 100  # characters of a value in a message to people
MAX_ANSWER = 16_000_000  # characters of an answer key; unit tests are long
# Control characters, and those that change the direction of the text around them.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class RowError(DataError):
    """A row that cannot be used. It is left out when shards are prepared, replaced when they are read, and counted.

    Args:
        cause: a short name, by which rows are counted.
        detail: the message for a person.
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(cause, detail)
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return self.detail


def plain(text: str) -> str:
    """Return a text with escapes for characters that would control a terminal."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def pack(row: Prompt, *, decode: bool = False) -> dict[str, bytes]:
    """Return the members of a row: extension -> content.

    Args:
        decode: decode the pixels of all files, not only their headers.

    Raises:
        RowError: as in `check_row`, an item that cannot be used, or a field of another type.
    """
    check_row(row)
    members: dict[str, bytes] = {}
    for medium in MEDIA.values():
        for i, files in enumerate(row.items(medium.name)):
            try:
                members |= _name_files(medium, i, files, decode=decode)
            except ValueError as error:
                raise RowError(f"bad {medium.item}", f"{medium.item} {i}: {error}") from None
    fields: dict[str, object] = {
        "id": row.key,
        "task": row.task,
        "modality": row.modality,
        "messages": row.messages,
        "answer": row.answer,
    }
    fields |= {"extra": row.extra} if row.extra else {}
    for medium in MEDIA.values():
        if medium.counts and (items := row.items(medium.name)):
            fields[medium.counts] = [len(files) for files in items]
    try:
        content = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
        parse(content)
    except (ValueError, TypeError) as error:
        raise RowError("bad field", str(error)) from None
    return {"json": content, **members}


def check_row(row: Prompt) -> None:
    """Refuse a row that is not well formed.

    Raises:
        RowError: no messages or no text, a message that is none of a chat, too much text, or items of a medium that do
            not match the messages or the modality.
    """
    if not row.messages:
        raise RowError("no messages", "it has no messages")
    for number, message in enumerate(row.messages):
        if (fault := _fault(message)) is not None:
            raise RowError("bad message", f"message {number} {fault}")
    _check_parts(row)
    check_text(row)


def _fault(message: object) -> str | None:
    """Return what is wrong with a message of a chat; None if it is right."""
    if not isinstance(message, Mapping):
        return f"is {_short(message)}, not an object"
    if (role := message.get("role")) not in ROLES:
        return f"has the role {_short(role)}; known are {', '.join(ROLES)}"
    content = message.get("content")
    if isinstance(content, str):
        return None
    if not isinstance(content, list | tuple):
        return f"has the content {_short(content)}; it must be text, or a list of parts"
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        # Chat templates take a part with such a key for an item of a medium, whatever its type is.
        is_text = kind == "text" and isinstance(part.get("text"), str) and not MEDIA_KEYS.intersection(part)
        if not is_text and not (isinstance(kind, str) and kind in MEDIA):
            return f'has the part {_short(part)}; a part is {{"type": "text", "text": ...}} or names a medium'
    return None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


def _check_parts(row: Prompt) -> None:
    """Check that each medium has as many items as the messages have places, and that they fit the modality."""
    if unknown := sorted(set(row.others) - set(MEDIA)):
        raise RowError("unknown medium", f"it has {unknown[0]!r}; known media are {', '.join(MEDIA)}")
    for name, medium in MEDIA.items():
        n = len(row.items(name))
        what = medium.items
        if (placeholders := count_parts(row.messages, name)) != n:
            raise RowError(f"{what} do not match", f"{placeholders} {name} parts in its messages, and {n} {what}")
    for name, medium in MEDIA.items():
        n = len(row.items(name))
        if medium.counts and (row.modality == name) != bool(n):
            raise RowError(f"{medium.items} do not match", f"{n} {medium.items}, and its modality is {row.modality!r}")
    if row.modality != "text" and row.modality not in MEDIA:
        raise RowError("unknown modality", f"its modality is {row.modality!r}; known are text, {', '.join(MEDIA)}")
    if (row.modality == "text") != (not row.is_visual):
        raise RowError("images do not match", f"{len(row.images)} images, and its modality is {row.modality!r}")


def _name_files(medium: Medium, item: int, files: Files, *, decode: bool) -> dict[str, bytes]:
    """Return the files of an item by member name, without the key."""
    forms = [FORMATS[form] for form, _ in medium.check(files, decode=decode)]
    named = enumerate(zip(files, forms, strict=True))
    return {f"{medium.member(item, i)}.{form}": file for i, (file, form) in named}


def unpack(key: str, content: bytes, files: Sequence[bytes]) -> Prompt:
    """Return the prompt of a row's json and of its files: the images, then the files of each counted medium.

    Raises:
        ValueError: not the json of a row, or more or fewer files than it says.
        RowError: as in `check_row`.
    """
    data = parse(content)
    counts = {name: data[m.counts] for name, m in MEDIA.items() if m.counts and data.get(m.counts)}
    images, others = _split(files, counts) if counts else (tuple(files), {})
    row = Prompt(
        key,
        data["task"],
        data["modality"],
        tuple(data["messages"]),
        images,
        data["answer"],
        data.get("extra", {}),
        others,
    )
    check_row(row)
    return row


def _split(
    files: Sequence[bytes], counts: Mapping[str, Sequence[int]]
) -> tuple[tuple[bytes, ...], dict[str, tuple[Files, ...]]]:
    """Return the images, and the files of each item of each other medium, as many as `counts` says."""
    first = len(files) - sum(map(sum, counts.values()))
    if first < 0:
        said = " and ".join(f"{sum(counts[name])} {MEDIA[name].files}" for name in counts)
        raise ValueError(f"it has {len(files)} files, and its json says {said}")
    others = {}
    at = first
    for name, each in counts.items():
        others[name] = tuple(tuple(files[a:b]) for a, b in pairwise(accumulate(each, initial=at)))
        at += sum(each)
    return tuple(files[:first]), others


def parse(content: bytes) -> dict[str, Any]:
    """Return the fields of a row's json.

    Raises:
        ValueError: not json, or a field is missing or of another type.
    """
    row = from_json(content.removeprefix(codecs.BOM_UTF8))
    if not isinstance(row, dict):
        raise ValueError(f"its json is {type(row).__name__}, not an object")
    for field in FIELDS:
        if not isinstance(row.get(field), list if field == "messages" else str):
            raise ValueError(
                f"its json has {_short(row[field])} as {field!r}" if field in row else f"its json has no {field!r}"
            )
    extra = row.get("extra", {})
    if not isinstance(extra, dict) or not all(isinstance(text, str) for text in extra.values()):
        raise ValueError(f"its json has {_short(extra)} as 'extra'; needed are texts by name")
    for medium in MEDIA.values():
        if medium.counts is None:
            continue
        counts = row.get(medium.counts, [])
        if not isinstance(counts, list) or not all(isinstance(count, int) and count > 0 for count in counts):
            raise ValueError(f"its json has {counts!r} as {medium.counts!r}; needed is how many each {medium.item} has")
    return row


def check_text(row: Prompt) -> None:
    """Refuse a row without text, or with more text than a model can read.

    Raises:
        RowError: no text, or too much of it.
    """
    text = sum(map(len, _strings(row.messages)))
    if not any(part.strip() for part in texts(row.messages)):
        raise RowError("no text", "there is no text in its messages")
    if text > MAX_TEXT:
        raise RowError("text too long", f"{text:,} characters of text; at most {MAX_TEXT:,}")
    if isinstance(row.answer, str) and len(row.answer) > MAX_ANSWER:
        raise RowError("answer too long", f"an answer key of {len(row.answer):,} characters; at most {MAX_ANSWER:,}")


def _strings(value: object) -> Iterator[str]:
    """Yield all strings of a JSON value; a chat template may show any of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(part)


def count_parts(messages: Iterable[Message], kind: str) -> int:
    """Count the parts of a kind, such as image, in the messages of a chat."""
    return sum(part.get("type") == kind for part in _parts(messages))


def texts(messages: Iterable[Message]) -> list[str]:
    """Return the texts in the messages of a chat."""
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
