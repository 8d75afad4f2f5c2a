"""Helpers for the converters of `data/`: read public data in place, take columns by name, keep images encoded."""

import base64
import csv
import json
import math
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field

from mmopd.errors import DataError
from mmopd.modality.pixels import FORMATS, encode_upright
from mmopd.prompts.rows import RowError
from mmopd.records import Message, Prompt
from mmopd.settings_file import Config, Positive
from mmopd.task import Task

TABLES = (".parquet", ".jsonl", ".json")
PICTURES = frozenset({*(f".{extension}" for extension in FORMATS.values()), ".jpeg", ".tif"})
BATCH = 64  # examples read at a time
MAX_FILE = 1 << 26  # bytes of an image file
MAX_NAME = 500  # characters of a path in a message
SHOWN = 60  # characters of anything longer
PLACEHOLDER = "<image>"  # where an image stands in a text


class SourceSettings(Config):
    """Settings that all converters share; each converter adds the names of its columns."""

    data: str = Field(
        description="a file (.parquet, .jsonl, .json), a folder of them or of `save_to_disk`, or a name on the hub"
    )
    subset: str | None = Field(
        None, description="a configuration on the hub; for a folder: the files whose names begin with it"
    )
    split: str = Field("train", description="for a folder: the files whose names begin with it, if there are any")
    task: str = Field(description="a task of modalities/")
    limit: Positive | None = Field(None, description="read only this many examples, from the start")
    root: Path | None = Field(
        None,
        description="folder in which image paths of a column start, and out of which none may lead; the folder of the "
        "data if not set",
    )


@dataclass(frozen=True)
class Examples:
    """Examples that can be iterated more than once; a line of a .jsonl file stays bytes until it is converted."""

    read: Callable[[], Iterator[Any]]
    count: int  # 0 if unknown

    def __iter__(self) -> Iterator[Any]:
        return self.read()

    def __length_hint__(self) -> int:
        return self.count


def read(settings: SourceSettings, columns: Iterable[str] | None = None) -> Examples:
    """Return the examples of a data set; images stay encoded.

    Args:
        columns: the columns that are needed (all if not given); the others are skipped where the format allows it.

    Raises:
        DataError: no such file or folder exists and the hub cannot be reached, or a file cannot be read.
    """
    path = Path(settings.data)
    wanted = None if columns is None else set(columns)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file() or not path.exists():
        found = _hub(settings, path if path.exists() else None, wanted)
    else:
        parts = [_table(file, wanted) for file in _files(path, settings)] or [_pictures(path)]
        count = sum(part.count for part in parts) if all(part.count for part in parts) else 0
        found = Examples(lambda: (example for part in parts for example in part), count)
    if settings.limit is None:
        return found
    return Examples(lambda: islice(found.read(), settings.limit), min(found.count or settings.limit, settings.limit))


def column(example: Mapping[str, Any], name: str) -> Any:
    """Return a value by the name of its column; `a.b` is `b` inside of `a`.

    Raises:
        RowError: the column is missing or empty.
    """
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

    An image may be bytes, a path, a record as the hub stores it, or an image in memory, which becomes a PNG.

    Raises:
        RowError: there is no image, or a file cannot be read.
    """
    value = column(example, name)
    folder = Path(settings.data)
    root = settings.root or (folder if folder.is_dir() else folder.parent)
    found = [_image(one, root) for one in (value if isinstance(value, list | tuple) else [value])]
    if not found:
        raise RowError(f"no {name}", f"the column {name!r} has no image")
    return found


def ask(
    task: Task,
    key: str,
    question: str,
    answer: str,
    files: Sequence[bytes] = (),
    *,
    extra: Mapping[str, str] | None = None,
) -> Prompt:
    """Return a row in the form of the task: images stand where `<image>` occurs in the question, or else before it.

    In a question of a text task, `<image>` is text like any other.

    Raises:
        RowError: the question has more or fewer `<image>` than there are images.
    """
    if PLACEHOLDER not in question or (task.modality == "text" and not files):
        return task.prompt(key, question, answer, files, extra)
    if question.count(PLACEHOLDER) != len(files):
        raise RowError(
            "images do not match",
            f"{question.count(PLACEHOLDER)} {PLACEHOLDER} in the question, but {len(files)} images",
        )
    messages = tuple(_with_images(message) for message in task.messages(question, 0))
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


def _image(value: Any, root: Path) -> bytes:
    if isinstance(value, Mapping):  # as the hub stores an image
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return _decoded(value) if value.startswith("data:") else _read_file(root, value)
    if isinstance(value, Image.Image):
        try:
            return encode_upright(value)
        except (ValueError, OSError) as error:
            raise RowError("bad image", str(error)) from None
    raise RowError("bad image", f"{type(value).__name__} is neither an encoded image nor a path")


def _decoded(url: str) -> bytes:
    head, _, content = url.partition(",")
    if not head.endswith(";base64"):
        raise RowError("bad image", f"{url[:SHOWN]!r}: a data URL must be base64")
    try:
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise RowError("bad image", f"{url[:SHOWN]!r}: a data URL that is not base64: {error}") from None


def _read_file(root: Path, name: str) -> bytes:
    """Return the content of an image file in a folder; a pipe or a device might never end."""
    path = root / name
    shown = str(path) if len(name) <= MAX_NAME else f"{name[:SHOWN]!r}... ({len(name):,} characters, and no data URL)"
    try:
        resolved = path.resolve()
        if not resolved.is_relative_to(root.resolve()):
            raise RowError("outside of the data", f"{shown}: outside of {root}; set `root` to a folder above it")
        about = resolved.stat()
        if not stat.S_ISREG(about.st_mode):
            raise RowError("no image file", f"{shown}: not a file")
        if about.st_size > MAX_FILE:
            raise RowError("bad image", f"{shown}: more than {MAX_FILE} bytes")
        return resolved.read_bytes()
    except OSError as error:
        raise RowError("no image file", f"{shown}: {error.strerror}") from None


def _files(path: Path, settings: SourceSettings) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in (*TABLES, ".csv"):
            raise DataError(f"{path}: cannot be read; known files are {', '.join(TABLES)}, .csv")
        return [path]
    files = sorted(file for file in path.rglob("*") if _is_table(file))
    if settings.subset is not None:
        files = [file for file in files if file.name.startswith(settings.subset) or file.parent.name == settings.subset]
        if not files:
            raise DataError(f"{path}: no file has a name that begins with {settings.subset!r} (`subset`)")
    return [file for file in files if file.name.startswith(settings.split)] or files


def _is_table(file: Path) -> bool:
    """Return true for a table of a folder; other .csv files than metadata.csv often list something else."""
    if file.name.startswith("._"):  # macOS's notes about a file
        return False
    return (file.suffix.lower() in TABLES or file.name.lower() == "metadata.csv") and file.is_file()


def _table(path: Path, wanted: set[str] | None) -> Examples:
    if path.suffix.lower() == ".parquet":
        try:
            count = pq.read_metadata(path).num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: not a parquet file, or a truncated one ({error})") from None
        return Examples(lambda: _parquet(path, wanted), count)
    if path.suffix.lower() == ".jsonl":
        return Examples(lambda: _lines(path), 0)
    if path.suffix.lower() == ".csv":
        return Examples(lambda: _csv(path), 0)
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    rows = data.get("data") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        raise DataError(f"{path}: it must be a list of examples, or an object with a list under the key 'data'")
    return Examples(lambda: iter(rows), len(rows))


def _parquet(path: Path, wanted: set[str] | None) -> Iterator[Any]:
    try:
        with pq.ParquetFile(path) as file:
            names = _needed(file.schema_arrow.names, wanted)
            for batch in file.iter_batches(BATCH, columns=names):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read to its end ({error})") from None


def _needed(there: Sequence[str], wanted: set[str] | None) -> list[str]:
    """Return the columns to read: all of them if a wanted one is missing, so that the message can list them."""
    if wanted is None:
        return list(there)
    needed = {name if name in there else name.partition(".")[0] for name in wanted}
    return [name for name in there if name in needed] if needed.issubset(there) else list(there)


def _csv(path: Path) -> Iterator[Any]:
    csv.field_size_limit(2 * MAX_FILE)  # an image as a data URL is longer than the 128 KiB of Python's limit
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield from csv.DictReader(file)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a .csv file that can be read to its end ({error})") from None


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield line


def _pictures(folder: Path) -> Examples:
    """Return the image files of a folder as examples: their path, their name, and the folder that they are in."""
    files = sorted(
        file for file in folder.rglob("*") if file.suffix.lower() in PICTURES and not file.name.startswith("._")
    )
    if not files:
        raise DataError(f"{folder}: it has neither {', '.join(TABLES)} files nor images")
    rows = [
        {"file_name": str(file.relative_to(folder)), "name": file.stem, "label": file.parent.name} for file in files
    ]
    return Examples(lambda: iter(rows), len(rows))


def _hub(settings: SourceSettings, folder: Path | None, wanted: set[str] | None) -> Examples:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{settings.data}: not a local file or folder; to read it from the hub, install `datasets`"
        ) from None
    try:
        if folder is None:
            data = datasets.load_dataset(settings.data, settings.subset, split=settings.split)
        else:
            data = datasets.load_from_disk(str(folder))
            data = data[settings.split] if isinstance(data, datasets.DatasetDict) else data
    except Exception as error:  # errors of the library, of the hub and of the network
        where = "cannot be read" if folder else "not a local file or folder, and the hub cannot be read"
        raise DataError(f"{settings.data}: {where} ({type(error).__name__}: {error})") from None
    names = _needed(data.column_names, wanted)
    stored = data.select_columns(names).with_format("arrow")  # the stored values: nothing is decoded
    return Examples(lambda: (row for table in stored.iter(BATCH) for row in table.to_pylist()), len(data))
