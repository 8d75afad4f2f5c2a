"""Which teacher scores which prompt, and what it is shown: everything here is checked before training starts."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from transformers import AutoTokenizer

from mmopd.config import Fleet, Route
from mmopd.errors import UserError
from mmopd.records import Message, Prompt


def find_route(fleet: Fleet, task: str, modality: str) -> Route:
    """The first route that matches.

    Raises:
        UserError: none does.
    """
    for route in fleet.routes:
        if fnmatchcase(task, route.task) and fnmatchcase(modality, route.modality):
            return route
    routes = "".join(f"\n  - {{task: {r.task!r}, modality: {r.modality!r}, teacher: {r.teacher}}}" for r in fleet.routes) or " none"
    raise UserError(f"no route for prompts of task {task!r} and modality {modality!r}; add one to the fleet's routes, which are:{routes}")


def check_routes(fleet: Fleet, pairs: Iterable[tuple[str, str]]) -> None:
    """Every (task, modality) of a mixture has a teacher.

    Raises:
        UserError: names the first pair that has none, and the routes that there are.
    """
    for task, modality in sorted(set(pairs)):
        find_route(fleet, task, modality)


def check_tokenizers(student: Path, teachers: Mapping[str, Path]) -> None:
    """Every token of the student has the same id in each teacher; a teacher may know more tokens, or fewer padding rows.

    Scoring is by ids alone, so that a teacher with other ids would judge another text, without any error.

    Raises:
        UserError: names the teacher and the first tokens that differ.
    """
    ours = _vocabulary(student)
    for name, folder in teachers.items():
        theirs = _vocabulary(folder)
        differing = [(token, i, theirs.get(token)) for token, i in sorted(ours.items(), key=lambda item: item[1]) if theirs.get(token) != i]
        if differing:
            shown = ", ".join(
                f"{token!r} is {i} for the student and {'unknown' if their is None else their} for the teacher"
                for token, i, their in differing[:3]
            )
            raise UserError(
                f"teacher {name!r} ({folder}): {len(differing)} of {len(ours)} tokens differ from the student's ({student}): {shown}. "
                "A teacher must share the student's tokenizer: choose one of the same model family"
            )


def show(prompt: Prompt, view: str) -> Prompt:
    """The prompt as a teacher with this view reads it."""
    return VIEWS[view](prompt)


def _vocabulary(folder: Path) -> dict[str, int]:
    try:
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    except Exception as error:
        raise UserError(f"{folder}: no tokenizer can be loaded from this folder: {error}") from error
    return vocabulary


def _full(prompt: Prompt) -> Prompt:
    return prompt


def _text(prompt: Prompt) -> Prompt:
    return dataclasses.replace(prompt, messages=tuple(_without_images(m) for m in prompt.messages), images=())


def _without_images(message: Message) -> Message:
    content = message["content"]
    return message if isinstance(content, str) else {**message, "content": [part for part in content if part.get("type") != "image"]}


VIEWS: dict[str, Callable[[Prompt], Prompt]] = {"full": _full, "text": _text}
