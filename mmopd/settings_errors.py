"""Errors of pydantic in the words of the files: one line for each key, with what was expected and what was found."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

MAX_LINES = 8
EXPECTED = {
    "string": "a text",
    "path": "a path",
    "model": "keys and values",
    "dict": "keys and values",
    "mapping": "keys and values",
    "tuple": "a list",
    "list": "a list",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the list of known names."""
    import difflib

    by_letters = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_letters, n=1)
    if near:
        return f"; did you mean {by_letters[near[0]]!r}?"
    return f"; there is {', '.join(sorted(by_letters.values())) or 'none'}"


def described(value: object) -> str:
    """Return a few words for a value of YAML: a text in quotes, a number, `a list`, `keys and values`, `nothing`."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list):
        return "keys and values" if isinstance(value, dict) else "a list"
    return shortened(repr(value), 60)


def shortened(text: str, limit: int = 400) -> str:
    """Return the text, without its middle if it is longer than `limit`."""
    return text if len(text) <= limit else f"{text[: limit - limit // 4]}...{text[-limit // 4 :]}"


class _Problem:
    """An error at a key.

    Attributes:
        key: the keys from the top to the value, without the names that pydantic gives to the parts of a union.
        expected: what could stand there; empty if `text` says all.
        text: what is wrong.
    """

    def __init__(self, error: Any, cls: type[BaseModel], data: Any) -> None:
        self.key: tuple[int | str, ...] = ()
        self.of_union = False
        self.chosen: list[str] = []  # which models of unions the values were meant as
        last = error["loc"][-1] if error["loc"] else ""
        for part in error["loc"]:
            inside = isinstance(data, dict) and part in data
            if inside or (isinstance(data, list) and isinstance(part, int) and part < len(data)):
                data = data[part]
            elif not (part == last and error["type"] in ("missing", "invalid_key")):
                self.of_union = self.of_union or part != "[key]"
                self.chosen.append(str(part))
                continue
            self.key += (part,)
        kind, found = error["type"], f"found {described(data)}"
        quotes = ": put quotes around it" if isinstance(data, int | float) else ""
        self.key_in_text = False
        self.name = shortened(".".join(str(part) for part in self.key), 120)
        self.expected: tuple[str, ...] = ()
        self.text = f"{error['msg'].replace('Input should be', 'has to be')}, {found}"
        if kind == "value_error":
            self.text = shortened(str(error["ctx"]["error"]))
        elif kind == "extra_forbidden":
            name = self.key[-1]
            near = suggest(str(name), _keys_at(cls, self.key[:-1], self.chosen))
            owner = _owner(cls, str(name))
            self.text = f"unknown key {self.name!r}{near if owner is None else f'; `{name}` belongs {owner}'}"
            self.key_in_text = True
        elif kind in ("too_short", "too_long"):
            length = error["ctx"].get("min_length", error["ctx"].get("max_length"))
            self.text = (
                f"expected {'at least' if kind == 'too_short' else 'at most'} {length} values, found {len(data)}"
            )
        elif kind == "missing":
            self.text = f"missing{_meaning(cls, self.key, self.chosen)}"
        elif kind == "union_tag_invalid":
            name, found = error["ctx"]["discriminator"].strip("'"), error["ctx"]["tag"]
            known = [word.strip("' ") for word in error["ctx"]["expected_tags"].split(",")]
            self.text = f"no {name} {found!r}{suggest(found, known)}"
        elif "[key]" in error["loc"] or kind == "invalid_key":
            self.text = "this key is no text: put quotes around it"
        elif kind.endswith(("_type", "_parsing", "_parsing_size", "_from_float")):
            expected = EXPECTED.get(kind.split("_")[0], kind)
            self.expected = (expected,)
            scalar = isinstance(data, str | int | float)
            fix = {"a text": quotes, "a path": quotes, "a list": ": put brackets around it" if scalar else ""}
            self.text = found + fix.get(expected, "")

    def line(self) -> str:
        """Return the key and what is wrong."""
        text = f"expected {' or '.join(self.expected)}, {self.text}" if self.expected else self.text
        return f"{self.name}: {text}" if self.name and not self.key_in_text else text


def explain(
    error: ValidationError, cls: type[BaseModel], data: dict[str, Any], where: str, overrides: Sequence[str]
) -> str:
    """Return one line for each key that is wrong, at most MAX_LINES.

    Args:
        error: what pydantic found.
        cls: the settings model.
        data: what was validated.
        where: beginning of each line.
        overrides: `key.path=value` settings that are in `data`; a line names the one that set its key.
    """
    problems: list[_Problem] = []
    for problem in (_Problem(one, cls, data) for one in error.errors(include_url=False)):
        same = [other for other in problems if other.key == problem.key and other.expected and problem.expected]
        if same:
            same[0].expected = tuple(dict.fromkeys(same[0].expected + problem.expected))
            same[0].text = max(same[0].text, problem.text, key=len)
        else:
            problems.append(problem)
    # A value that fits one part of a union in kind, and has a mistake inside, is meant as that part.
    problems = [
        one
        for one in problems
        if not (one.of_union and any(other.key[: len(one.key)] == one.key != other.key for other in problems))
    ]
    lines = [f"{where}: {problem.line()}{_set_by(problem, overrides)}" for problem in problems]
    more = [f"{where}: {len(lines) - MAX_LINES} more of this kind"] if len(lines) > MAX_LINES else []
    return "\n".join(lines[:MAX_LINES] + more)


def _set_by(problem: _Problem, overrides: Sequence[str]) -> str:
    """Return which override set the key of a problem, a part of it, or a key that the text names."""
    key = [str(part) for part in problem.key]
    for override in reversed(overrides):
        name = override.partition("=")[0]
        path = name.split(".")
        if path[: len(key)] == key[: len(path)] if key else name in problem.text:
            return f" (set by {described(override)})"
    return ""


def _keys_at(cls: type[BaseModel], key: Sequence[int | str], chosen: Sequence[str]) -> list[str]:
    """Return the keys of the model at `key` below `cls`; `chosen` has the names of the models of unions."""
    model: type[BaseModel] | None = cls
    for part in key:
        if model is not None and isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation, chosen)
    return list(model.model_fields) if model else []


def _owner(cls: type[BaseModel], name: str) -> str | None:
    """Return the place of a key somewhere in a file, which a wrong indentation moved; None if it is nowhere."""
    if name in cls.model_fields:
        return "to the top of the file: look at its indentation"
    models = [(key, _model_in(field.annotation)) for key, field in cls.model_fields.items()]
    for key, model in models:  # grows while it is read
        if model is not None and name in model.model_fields:
            return f"under `{key}`: look at its indentation"
        models += [] if model is None else [(k, _model_in(field.annotation)) for k, field in model.model_fields.items()]
    return None


def _meaning(cls: type[BaseModel], key: Sequence[int | str], chosen: Sequence[str]) -> str:
    """Return what the value at a key is for."""
    model: type[BaseModel] | None = cls
    text: str | None = None
    for part in key:
        if model is not None and isinstance(part, str) and part in model.model_fields:
            field = model.model_fields[part]
            model = _model_in(field.annotation, chosen)
            text = field.description or (model.__doc__ if model else None)
    return f" ({text.split('. ')[0].rstrip('.')})" if text else ""


def _model_in(annotation: Any, chosen: Sequence[str] = ()) -> type[BaseModel] | None:
    """Return the pydantic model inside `Model | None`, `tuple[Model, ...]` or `Mapping[str, Model]`.

    Of several models of a union it is the one that a name of `chosen` selects, or else the first.
    """
    models = list(_models_in(annotation))
    for model in models:
        literals = [get_args(field.annotation) for field in model.model_fields.values()]
        if any(name in values for values in literals for name in chosen):
            return model
    return models[0] if models else None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    else:
        for part in get_args(annotation):
            yield from _models_in(part)
