"""Helpers for the converters of `data/`: take columns by name, keep images encoded, put questions."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

from mmopd.prompts.image_files import encoded
from mmopd.prompts.reading import Example, SourceSettings, read
from mmopd.prompts.rows import RowError
from mmopd.prompts.tables import Examples
from mmopd.records import Message, Prompt
from mmopd.task import Task

__all__ = [
    "PLACEHOLDER",
    "Examples",
    "RowError",
    "SourceSettings",
    "answers",
    "ask",
    "column",
    "image",
    "images",
    "read",
    "text",
    "written",
]

PLACEHOLDER = "<image>"  # where an image stands in a text


def column(example: Mapping[str, Any], name: str) -> Any:
    """Return a value by the name of its column; `a.b` is `b` inside of `a`.

    Raises:
        RowError: the column is missing or empty, or the example has no columns.
    """
    if not isinstance(example, Mapping):
        raise RowError("no object", f"an example must be an object with columns, and is {type(example).__name__}")
    value: Any = example
    for part in [name] if name in example else name.split("."):
        if not isinstance(value, Mapping) or value.get(part) is None:
            there = (
                f"there is {', '.join(map(str, value))}"
                if isinstance(value, Mapping)
                else f"{type(value).__name__} has no parts"
            )
            raise RowError(f"no {name}", f"the column {name!r} is missing or empty; {there}")
        value = value[part]
    return value


def text(example: Mapping[str, Any], name: str) -> str:
    """Return a column as text, stripped of white space at its ends.

    Raises:
        RowError: the column is missing or empty.
    """
    value = column(example, name)
    if isinstance(value, Mapping | list) or not (stripped := written(value)):
        raise RowError(f"no {name}", f"the column {name!r} has {value!r}; it must have text")
    return stripped


def written(value: object) -> str:
    """Return a value of a table as text: NaN, which stands for a missing value, is empty, and 1e-07 is 0.0000001."""
    if isinstance(value, float):
        return "" if math.isnan(value) else format(Decimal(repr(value)), "f")
    return str(value).strip()


def answers(example: Mapping[str, Any], name: str) -> str:
    """Return a column with one or several right answers, as the JSON list that verifiers of short answers take.

    Raises:
        RowError: the column has no answer.
    """
    value = column(example, name)
    given = [written(one) for one in (value if isinstance(value, list | tuple) else [value]) if one is not None]
    if not (known := [one for one in given if one]):
        raise RowError(f"no {name}", f"the column {name!r} has {value!r}; it must have an answer")
    return json.dumps(list(dict.fromkeys(known)), ensure_ascii=False)


def images(example: Mapping[str, Any], name: str, settings: SourceSettings) -> list[bytes]:
    """Return the encoded files of a column with one or several images.

    An image may be bytes, a path, a data URL, base64, a record as the hub stores it, or an image in memory, which
    becomes a PNG.

    Raises:
        RowError: there is no image, or a file cannot be read.
    """
    value = column(example, name)
    found = [image(one, example, settings) for one in (value if isinstance(value, list | tuple) else [value])]
    if not found:
        raise RowError(f"no {name}", f"the column {name!r} has no image")
    return found


def image(value: Any, example: Mapping[str, Any], settings: SourceSettings) -> bytes:
    """Return the encoded file of one image, in any of the forms of `images`.

    Raises:
        RowError: it is no image, or its file cannot be read.
    """
    return encoded(value, settings.top, example.folder if isinstance(example, Example) else settings.top)


def ask(
    task: Task,
    key: str,
    question: str,
    answer: str,
    files: Sequence[bytes] = (),
    *,
    extra: Mapping[str, str] | None = None,
    earlier: Sequence[Message] = (),
) -> Prompt:
    """Return a row in the form of the task: images stand where `<image>` occurs in a text, or else before the question.

    In a question of a text task, `<image>` is text like any other.

    Args:
        earlier: messages before the question, each with a text as its content.

    Raises:
        RowError: the texts have more or fewer `<image>` than there are images.
    """
    places = sum(text.count(PLACEHOLDER) for text in (*(message["content"] for message in earlier), question))
    if not places or (task.modality == "text" and not files):
        prompt = task.prompt(key, question, answer, files, extra)
        return replace(prompt, messages=(*earlier, *prompt.messages))
    if places != len(files):
        raise RowError("images do not match", f"{places} {PLACEHOLDER} in the question, but {len(files)} images")
    messages = tuple(_with_images(message) for message in (*earlier, *task.messages(question, 0)))
    return Prompt(key, task.name, task.modality, messages, tuple(files), answer, dict(extra or {}))


def _with_images(message: Message) -> Message:
    content = message["content"]
    parts: list[Message] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        for i, piece in enumerate(part["text"].split(PLACEHOLDER) if part.get("type") == "text" else ()):
            parts += [{"type": "image"}] if i else []
            parts += [{"type": "text", "text": piece.strip("\n")}] if piece.strip() else []
        parts += [part] if part.get("type") != "text" else []
    return {**message, "content": parts}
