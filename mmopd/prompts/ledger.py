"""Findings about the rows of a source, in an append-only file next to its shards, from which a stopped pass resumes.

The file name is a hash of what the findings are made from, so all mixtures, recipes and runs share them. The first line
states it in full, and the file is refused for anything else. Each further line is one row.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self, TextIO

from mmopd.errors import DataError
from mmopd.prompts.shards import Shards
from mmopd.runtime.locks import claim

VERSION = 2
Origin = Mapping[str, Any]


def ledger_file(shards: Shards, kind: str, made_from: Origin) -> Path:
    """Return the path at which the findings of one kind about a source are kept."""
    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    return shards.folder / kind / f"{name}.jsonl"


class Ledger:
    """Findings by row, each a list of JSON values. A context manager that holds an exclusive lock on the file.

    Raises:
        DataError: the file was made from something else, is not such a file, or cannot be written.
    """

    what = "findings"  # their name in messages

    def __init__(self, path: Path, made_from: Origin) -> None:
        self._found: dict[int, list[Any]] = {}
        try:
            self._file = self._open(path, made_from)
        except OSError as error:
            raise DataError(f"{path}: {self.what} cannot be kept here ({error.strerror})") from None

    @classmethod
    def read(cls, path: Path, made_from: Origin) -> dict[int, list[Any]]:
        """Return the findings by row from a file that another process may hold.

        Raises:
            DataError: as in the class, or the file does not exist.
        """
        try:
            return cls._parse(path, made_from)[0]
        except OSError as error:
            raise DataError(f"{path}: {cls.what} cannot be read here ({error.strerror})") from None

    def add(self, row: int, *found: Any) -> None:
        """Record what was found about a row."""
        self._found[row] = list(found)
        self._file.write(json.dumps([row, *found]) + "\n")
        self._file.flush()

    def __getitem__(self, row: int) -> list[Any]:
        return self._found[row]

    def __contains__(self, row: int) -> bool:
        return row in self._found

    def __len__(self) -> int:
        return len(self._found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _open(self, path: Path, made_from: Origin) -> TextIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as undo:
            file = undo.enter_context(path.open("a+", encoding="utf-8"))
            claim(file, path, "run is measuring this source now")
            if path.stat().st_size:
                self._found, length = self._parse(path, made_from)
                file.truncate(length)  # drop a last line that a kill cut short
            else:
                file.write(json.dumps({"version": VERSION, "made_from": made_from}) + "\n")
                file.flush()
            undo.pop_all()
        return file

    @classmethod
    def _parse(cls, path: Path, made_from: Origin) -> tuple[dict[int, list[Any]], int]:
        """Return the findings of the complete lines, and the length of these lines in bytes."""
        whole, newline, _ = path.read_bytes().rpartition(b"\n")
        try:
            head, *lines = map(json.loads, whole.splitlines())
            _check(path, head, made_from)
            return {int(row): found for row, *found in lines}, len(whole) + len(newline)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: not {cls.what} ({error}); delete it to measure again") from None


def check_version(data: Mapping[str, Any]) -> None:
    """Raise ValueError unless a file is of this version."""
    if data["version"] != VERSION:
        raise ValueError(f"it has version {data['version']}, and this mmopd reads version {VERSION}")


def _check(path: Path, data: Mapping[str, Any], made_from: Origin) -> None:
    check_version(data)
    was = data["made_from"]
    now = json.loads(json.dumps(made_from))
    if changed := sorted(key for key in {*was, *now} if was.get(key) != now.get(key)):
        raise DataError(f"{path}: made from another {', another '.join(changed)}; delete it to measure again")
