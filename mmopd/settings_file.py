"""Base class of all settings, and YAML files as settings; errors name file and key, and suggest a known name."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmopd.errors import ConfigError
from mmopd.plain_yaml import YamlError, parse
from mmopd.settings_errors import described, explain, suggest

__all__ = ["Config", "Count", "File", "Fraction", "Positive", "build", "dump", "keys_of", "read", "suggest", "text_of"]

C = TypeVar("C", bound=BaseModel)
F = TypeVar("F", bound="File")
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=1, le=10_000)]  # of processes, GPUs or runs, each of which a plan lists
MAX_BYTES = 1 << 20  # largest accepted file
TASK_KEYS = {"include", "output_type", "doc_to_text", "metric_list"}  # of lmms-eval


class Config(BaseModel):
    """Base of all settings: immutable; unknown keys are errors, and so are numbers that are not finite."""

    # defer_build: a command pays for the validators of the files that it reads, not for those of all kinds.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_number_is_true(cls, data: Any) -> Any:
        """Refuse `yes`, which pydantic takes for 1."""
        switches = [name for name, value in data.items() if isinstance(value, bool)] if isinstance(data, dict) else []
        for name in switches:
            if name in cls.model_fields and _is_number(cls.model_fields[name].annotation):
                raise ValueError(f"{name}: expected a number, found {described(data[name])}")
        return data


class File(Config):
    """Base of the settings that fill a whole file.

    Attributes:
        what: the kind of file, with its article.
        use: what takes such a file; `{path}` stands for it.
    """

    what: ClassVar[str]
    use: ClassVar[str]

    @classmethod
    def required(cls) -> set[str]:
        """Return the keys that every file of this kind has."""
        return {name for name, field in cls.model_fields.items() if field.is_required()}


def read(cls: type[F], path: Path, overrides: Iterable[str] = ()) -> F:
    """Load a YAML file as `cls`, with `key.path=value` overrides.

    Raises:
        ConfigError: the file is missing, not YAML or of another kind, a key is unknown, or a value does not fit; names
            the file and the key.
    """
    data = keys_of(path)
    if not cls.required() & data.keys():
        others = {kind.what: kind.use for kind in File.__subclasses__() if kind.required() & data.keys()}
        if TASK_KEYS & data.keys():
            others["a task of lmms-eval"] = "a benchmark of a suite names it under `task`"
        for what, use in others.items():
            raise ConfigError(f"{path}: this is {what}, and {cls.what} is needed here: {use.format(path=path)}")
    return build(cls, data, str(path), overrides)


def keys_of(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file.

    Raises:
        ConfigError: the file is missing, or has no keys; names the file, and the line of what is no YAML.
    """
    try:
        data = parse(text_of(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except YamlError as error:
        raise ConfigError(f"{path}: {error}") from None
    if isinstance(data, dict):
        return data
    if isinstance(data, list) and data and isinstance(data[0], dict) and "api_key" in data[0]:
        use = f"`mmopd train RECIPE --endpoints {path}` takes it"
        raise ConfigError(f"{path}: this is a file of endpoints, which `mmopd serve` wrote: {use}")
    found = "the file is empty" if data is None else f"found {'a text' if isinstance(data, str) else described(data)}"
    raise ConfigError(f"{path}: expected keys and values, one `key: value` a line; {found}")


def text_of(path: Path) -> str:
    """Return the text of a file that a user wrote.

    Raises:
        ConfigError: it is not UTF-8, or is too large for a file that someone wrote; names the file and the line.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ConfigError(f"{path}: {size:,} bytes are too many for a file of settings (at most {MAX_BYTES:,})")
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")  # some editors write a mark of the encoding first
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {line} is not UTF-8: save the file in this encoding") from None


def build(cls: type[C], data: dict[str, Any], where: str, overrides: Iterable[str] = ()) -> C:
    """Return `data` as `cls`, with `key.path=value` overrides.

    Args:
        cls: the settings model.
        data: keys and values.
        where: beginning of error messages.
        overrides: settings to change.

    Raises:
        ConfigError: a key is unknown, or a value does not fit; the message names the key, and the override that set it.
    """
    overrides = list(overrides)
    for override in overrides:
        data = _with(data, override)
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, cls, data, where, overrides)) from None


def dump(settings: BaseModel) -> str:
    """Return the settings as YAML with all defaults."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's, where PyYAML was built with it
    return str(yaml.dump(settings.model_dump(mode="json"), Dumper=dumper, sort_keys=False, allow_unicode=True))


def _is_number(annotation: Any) -> bool:
    """Return true for a number or an optional one."""
    return annotation in (int, float) or any(_is_number(part) for part in get_args(annotation))


def _with(data: dict[str, Any], override: str) -> dict[str, Any]:
    """Return the data with an override; what an alias shares stays as it is elsewhere."""
    shown = described(override)
    key, eq, text = override.partition("=")
    keys = key.split(".")
    if not eq or not all(keys):
        raise ConfigError(f"{shown}: an override is written key=value, such as train.steps=20")
    try:
        value = parse(text)
    except YamlError as error:
        raise ConfigError(f"{shown}: the value of {key!r}: {error}") from None
    data = {**data}
    inside = data
    for parent in keys[:-1]:
        below = {} if inside.get(parent) is None else inside[parent]
        if not isinstance(below, dict):
            raise ConfigError(f"{shown}: {parent!r} is {described(below)} and has no keys: set it as a whole")
        inside[parent] = inside = {**below}
    inside[keys[-1]] = value
    return data
