"""Base class of all settings, and YAML files as settings; errors name file and key, and suggest a known name."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmopd.errors import ConfigError

C = TypeVar("C", bound=BaseModel)
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class Config(BaseModel):
    """Base of all settings: immutable; unknown keys are errors."""

    # defer_build: a command pays for the validators of the files that it reads, not for those of all kinds.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the list of known names."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there is {', '.join(sorted(known)) or 'none'}"


def read(cls: type[C], path: Path, overrides: Iterable[str] = ()) -> C:
    """Load a YAML file as `cls`, with `key.path=value` overrides.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value does not fit; names the file and the
            key.
    """
    try:
        data = parse(text_of(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(data).__name__}")
    return build(cls, data, str(path), overrides)


def text_of(path: Path) -> str:
    """Return the text of a file that a user wrote.

    Raises:
        UserError: it is not UTF-8; names the file and the line.
    """
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")  # some editors write a mark of the encoding first
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line} is not UTF-8: save the file in this encoding") from None


def parse(text: str) -> Any:
    """Return the value of a YAML text; libyaml reads it where PyYAML was built with it.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def build(cls: type[C], data: dict[str, Any], where: str, overrides: Iterable[str] = ()) -> C:
    """Return `data` as `cls`, with `key.path=value` overrides.

    Args:
        cls: the settings model.
        data: keys and values; the overrides are set in it.
        where: beginning of error messages.
        overrides: settings to change.

    Raises:
        ConfigError: a key is unknown, or a value does not fit; the message names the key.
    """
    for override in overrides:
        _set(data, override)
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        lines = [_explain(cls, e["loc"], e["msg"], e["type"]) for e in error.errors()]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None


def dump(settings: BaseModel) -> str:
    """Return the settings as YAML with all defaults."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _set(data: dict[str, Any], override: str) -> None:
    key, eq, value = override.partition("=")
    if not eq:
        raise ConfigError(f"{override!r}: an override is written key=value, such as train.steps=20")
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise ConfigError(f"{override!r}: {parent!r} is a value and has no keys")
    data[last] = parse(value)


def _explain(cls: type[BaseModel], loc: tuple[int | str, ...], message: str, kind: str) -> str:
    key = ".".join(str(part) for part in loc)
    if kind != "extra_forbidden":
        return f"{key}: {message}" if key else message
    return f"unknown key {key!r}{suggest(str(loc[-1]), _keys_at(cls, loc[:-1]))}"


def _keys_at(cls: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the model at `loc` below `cls`."""
    model: type[BaseModel] | None = cls
    for part in loc:
        if model is not None and isinstance(part, str) and part in model.model_fields:
            model = _model_in(model.model_fields[part].annotation)
    return list(model.model_fields) if model else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the pydantic model inside `Model | None`, `tuple[Model, ...]` or `Mapping[str, Model]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for m in map(_model_in, get_args(annotation)) if m), None)
