"""Rows of a benchmark, from a local file or by name from the model hub; rows of another schema are refused."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopd.errors import DataError, UserError
from mmopd.settings_errors import described

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """Where the rows of a benchmark are published, and their form."""

    hub: str  # name of the data set
    split: str
    columns: Mapping[str, tuple[type, ...]]  # columns that are read, each with the types of its values
    rows: int | None  # number of its rows; None if it is not fixed

    def read(self, data: Path | None) -> list[Row]:
        """Return all rows, of a local file or from the hub.

        Raises:
            DataError: a file that is missing, cut off, of another schema, or has another number of rows; or the hub
                does not give them. The message names the file.
            UserError: the client of the hub is not installed.
        """
        where = str(data) if data else f"{self.hub} of the model hub"
        rows = list(_local(data) if data else self._published())
        for number, row in enumerate(rows, 1):
            self._check(row, f"{where}: row {number}")
        if self.rows is not None and len(rows) != self.rows:
            raise DataError(f"{where}: {len(rows)} rows, and the benchmark has {self.rows}; `limit` asks fewer")
        return rows

    def _check(self, row: Any, where: str) -> None:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected keys and values, found {described(row)}")
        for name, types in self.columns.items():
            if name not in row:
                there = ", ".join(map(str, row)) or "none"
                raise DataError(f"{where}: no column {name!r}; there is {there}. The columns are those of {self.hub}")
            if not isinstance(row[name], types) or isinstance(row[name], bool):
                expected = " or ".join(one.__name__ for one in types)
                raise DataError(f"{where}: {name}: expected {expected}, found {described(row[name])}")

    def _published(self) -> Sequence[Any]:
        try:
            import datasets
        except ImportError:
            raise UserError("`datasets` is not installed; `pip install 'mmopd[hub]'` installs it") from None
        try:
            return list(datasets.load_dataset(self.hub, split=self.split))
        except Exception as error:  # the hub's client raises many kinds
            why = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise DataError(f"{self.hub} of the model hub: {why}; or name a local file under `data`") from None


def _local(path: Path) -> Iterator[Any]:
    """Yield the rows of a .jsonl or .parquet file."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq  # a page about a run needs no table

            try:
                yield from pq.read_table(path).to_pylist()
            except FileNotFoundError:
                raise
            except Exception as error:
                raise DataError(f"{path}: not a complete parquet file: {error}") from None
        elif path.suffix == ".jsonl":
            for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
                if line.strip():
                    yield _parsed(line, f"{path}: line {number}")
        else:
            raise DataError(f"{path}: `data` of a sampled benchmark is a .jsonl or .parquet file")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it is the `data` of a benchmark") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); the file may be cut off") from None
