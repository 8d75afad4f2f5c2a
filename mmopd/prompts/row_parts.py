"""A row as people read it: the parts of its messages in order, and texts that cannot control a terminal."""

from collections.abc import Iterator
from typing import NamedTuple

from mmopd.modality.registry import MEDIA
from mmopd.prompts.rows import plain
from mmopd.records import Files, Prompt

LINES = 12  # of a text
CHARACTERS = 800  # of a text


class Item(NamedTuple):
    """An item of a medium in a message."""

    label: str  # such as "image 1: 640 x 480 pixels, PNG, 31 KiB"
    files: Files


def messages(prompt: Prompt) -> Iterator[tuple[str, list[str | Item]]]:
    """Yield the role of each message and its parts in order: texts, and items of media."""
    items = {name: iter(enumerate(prompt.items(name), start=1)) for name in MEDIA}
    for message in prompt.messages:
        content = message["content"]
        if isinstance(content, str):
            yield message["role"], [content]
            continue
        parts: list[str | Item] = []
        for part in content:
            if part["type"] == "text":
                parts.append(part["text"])
            else:
                number, files = next(items[part["type"]])
                parts.append(Item(_label(part["type"], number, files), files))
        yield message["role"], parts


def _label(name: str, number: int, files: Files) -> str:
    medium = MEDIA[name]
    try:
        form, (width, height) = medium.check(files)[0]
    except ValueError as error:  # a row whose index was not made by mmopd, or a view that redraws
        return f"{medium.item} {number}: {plain(str(error))}"
    several = f"{len(files)} {medium.files}, " if len(files) > 1 else ""
    n = sum(map(len, files))
    size = f"{n / 1024:,.0f} KiB" if n >= 10_240 else f"{n:,} bytes"
    return f"{medium.item} {number}: {several}{width} x {height} pixels, {form}, {size}"


def shortened(text: str, characters: int = CHARACTERS, lines: int = LINES) -> str:
    """Return the beginning of a text, with its length if it is longer."""
    head = "\n".join(text[:characters].splitlines()[:lines])
    return plain(text) if len(head) >= len(text.rstrip()) else f"{plain(head)} ... ({len(text):,} characters)"
