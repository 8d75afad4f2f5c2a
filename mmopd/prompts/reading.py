"""Find the files of a data set, or its name on the hub, and read its examples as they are stored."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from mmopd.errors import DataError
from mmopd.prompts.foreign_tar import PICTURES, tar_rows
from mmopd.prompts.tables import BATCH, Bad, Examples, delimited, json_lines, json_list, needed, parquet, values
from mmopd.settings_file import Config, Positive

TABLES = (".parquet", ".jsonl", ".json")
DELIMITED = (".csv", ".tsv")
KNOWN = (*TABLES, *DELIMITED, ".tar")
METADATA = "metadata"  # name of the table of an image folder, whose paths start where it lies
ON_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
SPLITS = (("train", "training"), ("validation", "valid", "val", "dev"), ("test", "testing"))


class SourceSettings(Config):
    """Settings that all converters share; each converter adds the names of its columns."""

    data: str = Field(
        description="a file (.parquet, .jsonl, .json, .csv, .tsv, .tar), a folder of them, of images or of "
        "`save_to_disk`, or a name on the hub"
    )
    subset: str | None = Field(
        None, description="a configuration on the hub; for a folder: the files whose names begin with it"
    )
    split: str = Field("train", description="for a folder: the files or folders whose names begin with it")
    task: str = Field(description="a task of modalities/")
    limit: Positive | None = Field(None, description="read only this many examples, from the start")
    root: Path | None = Field(
        None,
        description="folder in which image paths of a column start, and out of which nothing may lead; the folder of "
        "the data if not set",
    )

    @property
    def top(self) -> Path:
        """Folder in which all files of the data are."""
        path = Path(self.data)
        return self.root or (path if path.is_dir() else path.parent)


class Example(dict[str, Any]):
    """An example whose image paths start in `folder`."""

    folder: Path


def read(settings: SourceSettings, columns: Iterable[str] | None = None) -> Examples:
    """Return the examples of a data set; images stay encoded.

    Args:
        columns: the columns that are needed (all if not given); the others are skipped where the format allows it.

    Raises:
        DataError: no such file or folder exists and the hub cannot be reached, or a file cannot be read.
    """
    path = Path(settings.data)
    wanted = None if columns is None else set(columns)
    if settings.root is not None and not settings.root.is_dir():
        raise DataError(f"root: {settings.root}: no such folder")
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        found = _hub(settings, path, wanted)
    elif not path.exists():
        if path.suffix.lower() in KNOWN or not ON_THE_HUB.fullmatch(settings.data):
            raise DataError(f"data: {settings.data}: no such file or folder in {Path.cwd()}")
        found = _hub(settings, None, wanted)
    else:
        parts = [_table(file, settings, wanted) for file in _files(path, settings)] or [_pictures(path, settings)]
        count = sum(part.count for part in parts) if all(part.count for part in parts) else 0
        found = Examples(lambda: (example for part in parts for example in part), count)
    if settings.limit is None:
        return found
    return Examples(lambda: islice(found.read(), settings.limit), min(found.count or settings.limit, settings.limit))


def _files(path: Path, settings: SourceSettings) -> list[Path]:
    """Return the tables or tars to read; none for a folder that has only images."""
    if not path.is_dir():
        if path.suffix.lower() not in KNOWN or not path.is_file():
            raise DataError(f"data: {path}: cannot be read; known files are {', '.join(KNOWN)}")
        return [path]
    files = sorted(file for file in path.rglob("*") if _is_table(file))
    files = [file for file in files if file.suffix.lower() == ".tar"] or files
    if settings.subset is not None:
        files = [file for file in files if file.name.startswith(settings.subset) or file.parent.name == settings.subset]
        if not files:
            raise DataError(f"subset: no file of {path} has a name that begins with {settings.subset!r}")
    chosen = _of_split(path, files, settings)
    for file in chosen:
        if not file.resolve().is_relative_to(settings.top.resolve()):
            raise DataError(f"{file}: leads out of {settings.top}; set `root` to a folder above both")
    return chosen


def _is_table(file: Path) -> bool:
    """Return true for a table of a folder; other .csv and .tsv files than metadata often list something else."""
    if file.name.startswith("._"):  # macOS's notes about a file
        return False
    suffix = file.suffix.lower()
    return (suffix in (*TABLES, ".tar") or (suffix in DELIMITED and file.stem.lower() == METADATA)) and file.is_file()


def _of_split(path: Path, files: list[Path], settings: SourceSettings) -> list[Path]:
    """Return the files of the split; if none has it and it was not asked for, those that are of no split.

    Raises:
        DataError: the split was asked for, or all files are of another one.
    """
    splits = {file: _split(file.relative_to(path)) for file in files}
    named = _canonical(settings.split)
    if chosen := [file for file in files if splits[file] == named or file.name.startswith(settings.split)]:
        return chosen
    if inside := [file for file in files if settings.split in file.relative_to(path).parts]:
        return inside
    others = [file for file in files if splits[file] is None]
    if files and ("split" in settings.model_fields_set or not others):
        there = ", ".join(sorted({one for one in splits.values() if one})) or "none"
        raise DataError(f"split: {path} has no {settings.split!r}; its splits are: {there}")
    return others


def _canonical(name: str) -> str | None:
    """Return the first name of a split for any of its names; None for a name of no split."""
    return next((names[0] for names in SPLITS if name.lower() in names), None)


def _split(file: Path) -> str | None:
    """Return the split that a file's name begins with, or that a folder above it is named after."""
    start = re.match(r"[a-z]+", file.name.lower())
    return next(filter(None, map(_canonical, [start[0] if start else "", *file.parts[:-1]])), None)


def _table(path: Path, settings: SourceSettings, wanted: set[str] | None) -> Examples:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        found = parquet(path, wanted)
    elif suffix == ".jsonl":
        found = json_lines(path)
    elif suffix == ".json":
        found = json_list(path)
    elif suffix == ".tar":
        found = tar_rows(path)
    else:
        found = delimited(path, wanted)
    if path.stem.lower() == METADATA and settings.root is None and path.parent != settings.top:
        return Examples(lambda: _starting_in(path.parent, found), found.count)
    return found


def _starting_in(folder: Path, examples: Examples) -> Iterator[Any]:
    """Yield examples with their folder."""
    for one in examples:
        if isinstance(one, Bad):
            yield one
            continue
        parsed = parse_line(one) if isinstance(one, bytes) else one
        if isinstance(parsed, dict):
            parsed = Example(parsed)
            parsed.folder = folder
        yield parsed


def parse_line(line: bytes) -> Any:
    """Return the example of a line of a .jsonl file, or a `Bad` one."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", str(error))
    except (ValueError, RecursionError) as error:
        return Bad("not JSON", str(error))


def _pictures(folder: Path, settings: SourceSettings) -> Examples:
    """Return the image files of a folder as examples: their path, their name, and the folder that they are in.

    If all of its folders are named after splits, those of one split are read.
    """
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower().removeprefix(".") in PICTURES and not file.name.startswith("._")
    )
    if not files:
        raise DataError(f"data: {folder}: it has neither {', '.join(KNOWN)} files nor images")
    above = {parts[0] for file in files if len(parts := file.relative_to(folder).parts) > 1}
    asked = "split" in settings.model_fields_set
    if above and (all(map(_canonical, above)) or (asked and settings.split in above)):
        named = _canonical(settings.split) or settings.split
        chosen = {one for one in above if (_canonical(one) or one) == named}
        if not chosen:
            raise DataError(f"split: {folder} has no {settings.split!r}; its folders are {', '.join(sorted(above))}")
        files = [file for file in files if file.relative_to(folder).parts[0] in chosen]

    def rows() -> Iterator[dict[str, str]]:
        for file in files:
            yield {"file_name": os.path.relpath(file, settings.top), "name": file.stem, "label": file.parent.name}

    return Examples(rows, len(files))


def _hub(settings: SourceSettings, folder: Path | None, wanted: set[str] | None) -> Examples:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"data: {settings.data}: not a local file or folder; to read it from the hub, install `datasets`"
        ) from None
    try:
        if folder is None:
            data = datasets.load_dataset(settings.data, settings.subset, split=settings.split)
        else:
            data = datasets.load_from_disk(str(folder))
            data = data[settings.split] if isinstance(data, datasets.DatasetDict) else data
    except Exception as error:  # errors of the library, of the hub and of the network
        where = "cannot be read" if folder else "not a local file or folder, and the hub cannot be read"
        raise DataError(f"data: {settings.data}: {where} ({type(error).__name__}: {error})") from None
    names = needed(data.column_names, wanted)
    stored = data.select_columns(names).with_format("arrow")  # the stored values: nothing is decoded
    return Examples(lambda: (row for table in stored.iter(BATCH) for row in values(table, settings.data)), len(data))
