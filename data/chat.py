r"""Chats of LLaVA's form or of OpenAI's, in a JSON, JSONL or Parquet file: the last answer is the key.

    mmopd prepare data/chat.py shards/mine --set data=llava.json --set root=images/ --set task=TASK
    mmopd prepare data/chat.py shards/mine --set data=chats.jsonl --set task=TASK

The turns are in the column `conversations` or `messages`: objects with `from` and `value` (human, gpt), or with `role`
and `content` (user, assistant). A content is a text or a list of parts: `{"type": "text", "text": ...}`, `{"type":
"image_url", "image_url": {"url": ...}}` or `{"type": "image", "image": ...}`, also as `input_text` and `input_image`.
An image is a data URL, a path or bytes; a URL of the network is never fetched, and its row is left out.

`<image>` in a text, and a part without an image of its own, stand for the next image of the column `image` or `images`;
if nothing stands for them, they come before the first question. The whole chat is asked: the last question in the form
of the task, earlier turns as they are. A row with images for a task on text, or without them for one on images, is not
wanted.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import Field

from mmopd.prompts import RowError
from mmopd.prompts import convert as columns
from mmopd.prompts.convert import PLACEHOLDER, SourceSettings
from mmopd.records import Prompt
from mmopd.task import Task

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
ROLES |= {role: role for role in ("system", "user", "assistant")}
TEXTS = ("text", "input_text")
IMAGES = ("image", "image_url", "input_image")
SHOWN = 100  # characters


class Settings(SourceSettings):
    chat: str | None = Field(None, description="column with the turns; `conversations` or `messages` if not set")
    images: str | None = Field(None, description="column with images; `image` or `images` if not set")
    answer: str | None = Field(None, description="column with the answer; the last turn of the assistant if not set")
    number: str | None = Field(None, description="column with the name of an example; its number if not set")


def examples(settings: Settings) -> Iterable[Any]:
    return columns.read(settings)


def convert(example: dict[str, Any], settings: Settings, task: Task) -> Prompt | None:
    own: list[Any] = []
    turns = [read_turn(turn, own) for turn in turns_of(example, settings)]
    said = turns.pop()["content"].strip() if turns[-1]["role"] == "assistant" else ""
    answer = columns.text(example, settings.answer) if settings.answer else said
    if not answer:
        raise RowError("no answer", "the last turn is not an answer of the assistant, and `answer` names no column")
    if not turns or turns[-1]["role"] != "user":
        raise RowError("no question", "there is no turn of the user before the answer")
    files = images_of(example, settings, task, own)
    if bool(files) != (task.modality == "image"):
        return None
    if not turns[-1]["content"].replace(PLACEHOLDER, "").strip():
        raise RowError("no question", "the last turn of the user has no text")
    if files and PLACEHOLDER in said:
        raise RowError("images do not match", "an image stands in the answer")
    if files and not any(PLACEHOLDER in turn["content"] for turn in turns):
        first = next(turn for turn in turns if turn["role"] == "user")
        first["content"] = PLACEHOLDER * len(files) + first["content"]
    key = columns.text(example, settings.number) if settings.number else ""
    *earlier, last = turns
    return columns.ask(task, key, last["content"].strip(), answer, files, earlier=earlier)


def turns_of(example: Mapping[str, Any], settings: Settings) -> list[Any]:
    """Return the turns of an example as they are stored."""
    name = settings.chat or ("messages" if isinstance(example, Mapping) and "messages" in example else "conversations")
    turns = columns.column(example, name)
    if not isinstance(turns, list) or not turns:
        raise RowError("no turns", f"the column {name!r} has {str(turns)[:SHOWN]!r}; it must be a list of turns")
    return turns


def read_turn(turn: Any, own: list[Any]) -> dict[str, str]:
    """Return a turn as role and text, with `<image>` where images stand.

    Args:
        own: gets an entry for each place of an image: its own image, or None for the next one of the column.
    """
    if not isinstance(turn, Mapping):
        raise RowError("bad turn", f"a turn is {str(turn)[:SHOWN]!r}; it must be an object")
    said = turn.get("role", turn.get("from"))
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise RowError("unknown role", f"a turn has the role {str(said)[:SHOWN]!r}; known are {', '.join(ROLES)}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, str):
        own += [None] * content.count(PLACEHOLDER)
        return {"role": role, "content": content}
    if not isinstance(content, list) or not content:
        raise RowError("bad turn", f"a turn has the content {str(content)[:SHOWN]!r}; it must be text or parts")
    return {"role": role, "content": "".join(read_parts(content, own))}


def read_parts(parts: list[Any], own: list[Any]) -> Iterator[str]:
    """Yield the texts of a turn's parts, with `<image>` for an image."""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in TEXTS and isinstance(part.get("text"), str):
            own += [None] * part["text"].count(PLACEHOLDER)
            yield part["text"]
        elif kind in IMAGES:
            own.append(image_of(part))
            yield PLACEHOLDER
        else:
            raise RowError("unknown part", f"a turn has the part {str(part)[:SHOWN]!r}; known are texts and images")


def image_of(part: Mapping[str, Any]) -> Any:
    """Return the image that a part has itself; None if it stands for one of the column."""
    for name in ("image_url", "image", "url", "path", "bytes"):
        value = part.get(name)
        if name == "image_url" and isinstance(value, Mapping):
            value = value.get("url")
        if value is not None:
            return value
    return None


def images_of(example: Mapping[str, Any], settings: Settings, task: Task, own: list[Any]) -> list[bytes]:
    """Return the images of a chat, in the order of their places."""
    names = [settings.images] if settings.images else ["image", "images"]
    name = next((name for name in names if example.get(name) not in (None, "", [])), None)
    given = [] if name is None else columns.images(example, name, settings)
    if not own or (task.modality == "text" and not given and not any(own)):
        return given
    places = sum(image is None for image in own)
    if places != len(given):
        raise RowError("images do not match", f"{places} places for images, but the column has {len(given)}")
    rest = iter(given)
    return [next(rest) if one is None else columns.image(one, example, settings) for one in own]
