"""Reference of all settings: `mmopd show --explain KEY`, and docs/reference/.

`python -m mmopd.commands.reference` writes docs/reference/. All texts come from the code: settings from the models of
`mmopd.config`, metrics from `mmopd.report.metrics`, commands from the command line. Loads no torch.
"""

import difflib
import inspect
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape

from mmopd.config import Comparison, Fleet, Mixture, Recipe, Suite
from mmopd.errors import UserError
from mmopd.runtime import python

PAGES: dict[str, tuple[type[BaseModel], str]] = {
    "recipe": (Recipe, "recipes/*.yaml"),
    "fleet": (Fleet, "teachers/*.yaml"),
    "mixture": (Mixture, "data/*.yaml"),
    "suite": (Suite, "eval/*.yaml"),
    "comparison": (Comparison, "recipes/compare_*.yaml"),
}
NAME = "NAME"  # in a path: a name that the file chooses
NUMBER = "N"  # in a path: a position in a list
WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path", Any: "any value"}
BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
PAPER = "https://arxiv.org/abs/2605.03677"
HEADER = "<!-- Written by `python -m mmopd.commands.reference`; a test compares it with the models. -->"


@dataclass(frozen=True, slots=True)
class Section:
    """A settings model at a place of a file."""

    path: tuple[str, ...]  # () for the file itself
    model: type[BaseModel]
    by: str = ""  # if several models are allowed there: the key that selects one, `kind` or `runner`
    kind: str = ""  # its value that selects this one

    @property
    def chosen(self) -> str:
        """The line of a file that selects the model; empty if it is the only one."""
        return f"{self.by}: {self.kind}" if self.kind else ""

    @property
    def title(self) -> str:
        """Path, and what selects the model if there is a choice."""
        return ".".join(self.path) + (f" ({self.chosen})" if self.chosen else "")

    @property
    def about(self) -> str:
        """Docstring of the model as one paragraph."""
        return " ".join((inspect.getdoc(self.model) or "").split())


@dataclass(frozen=True, slots=True, eq=False)
class Key:
    """A setting at a place of a file."""

    page: str
    section: Section
    name: str
    field: FieldInfo

    @property
    def path(self) -> tuple[str, ...]:
        """Names from the top of the file down to this key."""
        return (*self.section.path, self.name)

    @property
    def type(self) -> str:
        """Type and range in words."""
        return _words(self.field.annotation, self.field.metadata)

    @property
    def default(self) -> str:
        """Default in YAML notation; `required` if there is none."""
        if self.field.is_required():
            return "required"
        return _yaml(self.field.get_default(call_default_factory=True))

    def to_dict(self) -> dict[str, str | None]:
        """Return what `explain` prints, as JSON types."""
        return {
            "key": ".".join(self.path),
            "file": PAGES[self.page][1],
            "kind": self.section.kind or None,
            "type": self.type,
            "default": self.default if _has_default(self) else None,
            "description": self.field.description,
        }


def sections(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[Section]:
    """Yield the model and all models below it, in the order of their fields."""
    kinds = _kinds(model)
    by = "kind" if len(kinds) > 1 else "runner" if "runner" in model.model_fields else ""
    for one in kinds:
        yield Section(path, one, by, _value_of(one, by))
        for name, field in one.model_fields.items():
            for below, inner in _models(field.annotation):
                yield from sections(inner, (*path, name, *below))


def keys(page: str) -> list[Key]:
    """Return every setting of a kind of file that holds a value, not a group of settings."""
    return [
        Key(page, section, name, field)
        for section in sections(PAGES[page][0])
        for name, field in section.model.model_fields.items()
        if not _is_section(field)
    ]


def find(key: str) -> list[Key]:
    """Return the keys that a name means: its whole path, or its last names if they are enough.

    Raises:
        UserError: there is no such key; the message names the nearest.
    """
    known = [one for page in PAGES for one in keys(page)]
    wanted = key.split(".")
    ranks = {one: rank for one in known if (rank := _match(wanted, one.path)) is not None}
    if not ranks:
        names = {".".join(one.path) for one in known} | {one.name for one in known}
        near = difflib.get_close_matches(key, names) or difflib.get_close_matches(wanted[-1], names)
        raise UserError(f"no key {key!r}" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else ""))
    return [one for one, rank in ranks.items() if rank == min(ranks.values())]


def explain(key: str, console: Console) -> None:
    """Print the meaning of a key.

    Raises:
        UserError: there is no such key.
    """
    for i, one in enumerate(find(key)):
        console.print("\n" * (i > 0) + f"[bold]{escape('.'.join(one.path))}[/]  in {PAGES[one.page][1]}")
        if one.section.chosen:
            console.print(f"  with {one.section.chosen}")
        console.print(
            f"  {escape(one.type)}; " + (f"default {escape(one.default)}" if _has_default(one) else "required")
        )
        console.print(f"  {escape(one.field.description or '')}.")


def pages() -> dict[str, str]:
    """Return the pages of docs/reference/ by file name."""
    return {f"{page}.md": _page(page) for page in PAGES} | {"metrics.md": _metrics_page(), "cli.md": _cli_page()}


def _metrics_page() -> str:
    from mmopd.report.metrics import METRICS

    lines = [
        *("# Metrics", "", HEADER, ""),
        "`RUN/metrics.jsonl` has one JSON object for each step, and [loggers](../training.md#loggers) send it on. "
        "A value that is not finite is null. `*` stands for the name of a task, a teacher, a source or a cause. An "
        "equation is one "
        f"of [the paper]({PAPER}).",
        *("", "| name | meaning |", "|---|---|"),
        *(f"| `{name}` | {_cell(text)} |" for name, text in METRICS.items()),
    ]
    return "\n".join(lines) + "\n"


def _cli_page() -> str:
    """Return the page of all commands, as typer writes it from their help."""
    command = python.command("-m", "typer", "mmopd.cli", "utils", "docs", "--name", "mmopd", "--title", "Commands")
    done = subprocess.run(
        command, env=os.environ | python.environment(), check=True, capture_output=True, text=True, encoding="utf-8"
    )
    # The headings are a list of the commands already, whose help is not cut.
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", done.stdout)
    about = (
        "Every command ends with an [exit status](exit-statuses.md). `show`, `plan`, `doctor` and `eval` print JSON "
        "with `--json`. `mmopd --install-completion` makes the shell complete commands, options and names of "
        "the catalogue."
    )
    return text.replace("# Commands\n", f"# Commands\n\n{HEADER}\n\n{about}\n", 1).rstrip() + "\n"


def _page(page: str) -> str:
    lines = [f"# `{PAGES[page][1]}`", "", HEADER, ""]
    for section in sections(PAGES[page][0]):
        if section.path:
            lines += [f"## `{'.'.join(section.path)}`" + (f", `{section.chosen}`" if section.chosen else ""), ""]
        lines += [section.about, ""]
        own = [one for one in keys(page) if one.section == section]
        if own:
            lines += ["| key | type | default | |", "|---|---|---|---|"]
            lines += [
                f"| `{one.name}` | {_cell(one.type)} | {_code(one)} | {_cell(one.field.description)}. |" for one in own
            ]
            lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("<", "&lt;")


def _code(key: Key) -> str:
    return f"`{_cell(key.default)}`" if _has_default(key) else "required"


def _has_default(key: Key) -> bool:
    return not key.field.is_required()


def _match(wanted: Sequence[str], path: Sequence[str]) -> int | None:
    """Return how well names fit a path: 0 the whole path, 1 its end, 2 a section of it; None if they do not fit.

    A name that the file chooses fits NAME.
    """
    n = len(wanted)
    for begin in reversed(range(len(path) - n + 1)):
        part = path[begin : begin + n]
        if wanted[-1] == part[-1] and all(w == p or p in {NAME, NUMBER} for w, p in zip(wanted, part, strict=True)):
            return 2 if begin + n < len(path) else 0 if n > 1 and not begin else 1
    return None


def _kinds(model: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the models that can be used in place of this one: all objectives for their base."""
    from mmopd.algorithm.base import Objective
    from mmopd.algorithm.objectives import OBJECTIVES

    return list(OBJECTIVES.values()) if model is Objective else [model]


def _value_of(model: type[BaseModel], by: str) -> str:
    return str(get_args(model.model_fields[by].annotation)[0]) if by else ""


def _is_section(field: FieldInfo) -> bool:
    """Return true if the value is one group of settings; lists and mappings of groups are keys with a value."""
    return any(not below for below, _ in _models(field.annotation))


def _models(annotation: Any) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """Yield the models in an annotation, each with the part of its path between the key and the model's own keys."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield (), annotation
        return
    origin = get_origin(annotation)
    inner = get_args(annotation)
    if origin is Annotated:
        inner = inner[:1]
    below = (NUMBER,) if origin is tuple else (NAME,) if _is_mapping(origin) else ()
    for one in inner:
        for path, model in _models(one):
            yield (*below, *path), model


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """Return a type and its range in words."""
    origin = get_origin(annotation)
    inner = get_args(annotation)
    if origin is Annotated:
        return _words(inner[0], [*_flat(inner[1:]), *metadata])
    ranges = "".join(f", {sign} {getattr(bound, name):g}" for bound, name, sign in _bounds(metadata))
    if origin in (Union, UnionType):
        kinds = [one for one in inner if one is not NoneType]
        words = " or ".join(dict.fromkeys(_words(one) for one in kinds)) + ranges
        return f"{words}; or null" if NoneType in inner else words
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is tuple:
        some = "at least one" if any(isinstance(one, MinLen) for one in metadata) else ""
        if len(inner) == 2 and inner[1] is not Ellipsis:
            return f"two of: {_words(inner[0])}"
        return "list of " + (f"{some} of " if some else "") + _words(inner[0])
    if _is_mapping(origin):
        return f"mapping: {_words(inner[0])} to {_words(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "settings"
    return WORDS[annotation] + ranges


def _flat(metadata: Sequence[Any]) -> list[Any]:
    return [one for item in metadata for one in (item.metadata if isinstance(item, FieldInfo) else [item])]


def _bounds(metadata: Sequence[Any]) -> Iterator[tuple[Any, str, str]]:
    for bound in _flat(metadata):
        if type(bound) in BOUNDS:
            name, sign = BOUNDS[type(bound)]
            yield bound, name, sign


def _yaml(value: Any) -> str:
    """Return a default in YAML notation, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_yaml(one)}' for key, one in value.items())}}}"
    return f"{value:g}" if isinstance(value, float) else '""' if value == "" else str(value)


if __name__ == "__main__":
    folder = Path(__file__).parents[2] / "docs" / "reference"
    for name, text in pages().items():
        (folder / name).write_text(text, encoding="utf-8")
