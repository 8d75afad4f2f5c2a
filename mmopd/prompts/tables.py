"""Examples of one file as they are stored: Parquet, JSON lines, JSON, CSV; images stay encoded.

Files are read in pieces, each of a bounded size, and a row that cannot be read is a `Bad` one between the others.
"""

import codecs
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from mmopd.errors import DataError

BATCH = 64  # examples read at a time
BATCH_BYTES = 1 << 26  # of the examples read at a time, at most, as the file's own statistics estimate it
MAX_ROW = 1 << 27  # characters of a row; an image as a data URL is long
MAX_OBJECT = 1 << 28  # bytes of a .json file that is one object
PIECE = 1 << 20  # characters of a .json file read at a time
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
DELIMITERS = (",", ";", "\t", "|")
RECODE = "save the file as UTF-8, such as with `iconv -f WINDOWS-1252 -t UTF-8`"


class Bad(NamedTuple):
    """An example that cannot be read; it is counted by its cause."""

    cause: str
    detail: str


@dataclass(frozen=True)
class Examples:
    """Examples that can be iterated more than once; a line of a .jsonl file stays bytes until it is converted."""

    read: Callable[[], Iterator[Any]]
    count: int  # 0 if unknown

    def __iter__(self) -> Iterator[Any]:
        return self.read()

    def __length_hint__(self) -> int:
        return self.count


def parquet(path: Path, wanted: set[str] | None) -> Examples:
    """Return the rows of a Parquet file, of the wanted columns alone if it has them all.

    Raises:
        DataError: it is no Parquet file, or a truncated one.
    """
    try:
        about = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a parquet file, or a truncated one ({error})") from None
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return Examples(lambda: _parquet(path, wanted, max(1, min(BATCH, BATCH_BYTES // max(1, largest)))), about.num_rows)


def _parquet(path: Path, wanted: set[str] | None, batch: int) -> Iterator[Any]:
    try:
        with pq.ParquetFile(path) as file:
            for rows in file.iter_batches(batch, columns=needed(file.schema_arrow.names, wanted)):
                yield from values(rows, str(path))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read to its end ({error})") from None


def values(rows: Any, where: str) -> list[Any]:
    """Return rows of Arrow as examples; one with a text that is not UTF-8, or a date that nobody can write, is bad."""
    try:
        return list(rows.to_pylist())
    except (ValueError, OverflowError) as error:
        if len(rows) > 1:
            return [one for i in range(len(rows)) for one in values(rows.slice(i, 1), where)]
        return [Bad("not UTF-8" if isinstance(error, UnicodeDecodeError) else "bad value", f"{where}: {error}")]


def needed(there: Sequence[str], wanted: set[str] | None) -> list[str]:
    """Return the columns to read: all of them if a wanted one is missing, so that the message can list them."""
    if wanted is None:
        return list(there)
    names = {name if name in there else name.partition(".")[0] for name in wanted}
    return [name for name in there if name in names] if names.issubset(there) else list(there)


def json_lines(path: Path) -> Examples:
    """Return the lines of a .jsonl file, as bytes."""
    return Examples(lambda: _lines(path), 0)


def _lines(path: Path) -> Iterator[bytes | Bad]:
    with path.open("rb") as file:
        while line := file.readline(MAX_ROW):
            if len(line) == MAX_ROW and not line.endswith(b"\n"):
                while (rest := file.readline(MAX_ROW)) and not rest.endswith(b"\n"):
                    pass
                yield Bad("row too long", f"{path}: a line of more than {MAX_ROW:,} bytes")
            elif line.strip():
                yield line


def json_list(path: Path) -> Examples:
    """Return the examples of a .json file: of a list, read piece by piece, or of an object with a list under `data`.

    Raises:
        DataError: it is not JSON, or has no list of examples.
    """
    with _opened(path) as file:
        listed = (file.read(PIECE).lstrip() or " ")[0] == "["
    if listed:
        next(_Json(path).rows(), None)  # fails now if even the first cannot be read
        return Examples(lambda: _Json(path).rows(), 0)
    if (size := path.stat().st_size) > MAX_OBJECT:
        way = f"write its list as lines: `jq -c '.data[]' {path.name} > {path.stem}.jsonl`"
        raise DataError(f"{path}: {size:,} bytes are too many for one object (at most {MAX_OBJECT:,}); {way}")
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    rows = data.get("data") if isinstance(data, dict) else data
    if not isinstance(rows, list):
        raise DataError(f"{path}: it must be a list of examples, or an object with a list under the key 'data'")
    return Examples(lambda: iter(rows), len(rows))


class _Json:
    """Reads the list of a .json file one element after the other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._decoder = json.JSONDecoder()
        self._text = ""
        self._at = 0  # position in `_text`
        self._before = 0  # characters of the file before `_text`

    def rows(self) -> Iterator[Any]:
        """Yield the elements.

        Raises:
            DataError: the file is not JSON, from the element on that is being read.
        """
        with _opened(self._path) as file:
            try:
                self._skip(file, "[")
                first = True
                while self._peek(file) != "]":
                    if not first:
                        self._skip(file, ",")
                    first = False
                    yield self._element(file)
                self._skip(file, "]")
                if self._peek(file):
                    raise json.JSONDecodeError("extra data", self._text, self._at)
            except json.JSONDecodeError as error:
                raise self._error(f"{error.msg} at character {self._before + error.pos:,}") from None
            except (ValueError, RecursionError) as error:
                raise self._error(str(error)) from None

    def _element(self, file: IO[str]) -> Any:
        self._peek(file)
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more(file):  # a number may go on
                    self._at = end
                    return value
            except json.JSONDecodeError:
                if len(self._text) - self._at > MAX_ROW or not self._more(file):
                    raise

    def _peek(self, file: IO[str]) -> str:
        """Return the next character that is no blank; empty at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(file):
                return ""

    def _skip(self, file: IO[str], character: str) -> None:
        if self._peek(file) != character:
            raise json.JSONDecodeError(f"expected {character!r}", self._text, self._at)
        self._at += 1

    def _more(self, file: IO[str]) -> bool:
        """Read on, twice as much each time that one element needs more; return false at the end of the file."""
        kept = self._text[self._at :]
        piece = file.read(max(PIECE, len(kept)))
        self._before += self._at
        self._text, self._at = kept + piece, 0
        return bool(piece)

    def _error(self, what: str) -> DataError:
        return DataError(f"{self._path}: not valid JSON ({what})")


def delimited(path: Path, wanted: set[str] | None) -> Examples:
    """Return the rows of a .csv or .tsv file; its first line names the columns.

    The delimiter of a .csv file is the one with which the first line has most of the wanted columns, then most columns.

    Raises:
        DataError: the file is empty, or its first line does not name columns.
    """
    delimiters = ("\t",) if path.suffix.lower() == ".tsv" else DELIMITERS
    headers = {delimiter: _header(path, delimiter) for delimiter in delimiters}
    wanted = wanted or set()
    delimiter = max(delimiters, key=lambda one: (len(wanted.intersection(headers[one])), len(headers[one])))
    names = headers[delimiter]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise DataError(f"{path}: the column {twice[0]!r} stands twice in its first line; rename one of them")
    return Examples(lambda: _delimited(path, delimiter, len(names)), 0)


def _header(path: Path, delimiter: str) -> list[str]:
    with _opened(path) as file:
        try:
            names = next((row for row in _reader(_Lines(file), delimiter) if any(row)), [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}: the line with the names of its columns cannot be read ({error})") from None
    if not names:
        raise DataError(f"{path}: it is empty; its first line must name the columns")
    if not _is_text(names):
        raise DataError(f"{path}: the line with the names of its columns is not UTF-8; {RECODE}")
    return [name.strip() for name in names]


def _delimited(path: Path, delimiter: str, columns: int) -> Iterator[Any]:
    """Yield the rows; of a row that is broken, each of its lines counts as bad, since each may have been a row."""
    names: list[str] = []
    with _opened(path) as file:
        lines = _Lines(file)
        reader = _reader(lines, delimiter)
        while True:
            first = lines.begin()
            try:
                row = next(reader, None)
            except csv.Error as error:
                last = max(first, lines.number)
                where = f"line {first}" if first == last else f"lines {first} to {last}"
                for _ in range(first, last + 1):
                    yield Bad("broken quotes", f"{path}: {where}: {error}")
                continue
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: line {lines.number + 1} is not {error.encoding} ({error.reason})") from None
            if row is None:
                return
            if not any(row):
                continue  # a blank line
            if not names:
                names = [name.strip() for name in row]
            elif len(row) > columns:
                what = f"{len(row)} columns, and the first line names {columns}; quote texts that have {delimiter!r}"
                yield Bad("too many columns", f"{path}: line {first}: {what}")
            elif not _is_text(row):
                yield Bad("not UTF-8", f"{path}: line {first}: {RECODE}")
            else:
                yield {name: value for name, value in zip(names, row, strict=False) if name}


def _reader(lines: "_Lines", delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_ROW)
    return csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)


class _Lines:
    """The lines of a file for `csv.reader`, with their number; a row of more than `MAX_ROW` characters is an error."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._read = 0  # characters of the row
        self.number = 0  # lines read

    def begin(self) -> int:
        """Begin a row; return the number of its first line."""
        self._read = 0
        return self.number + 1

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_ROW)
        if not line:
            raise StopIteration
        self.number += 1
        self._read += len(line)
        if self._read >= MAX_ROW:
            while line and not line.endswith(("\n", "\r")):
                line = self._file.readline(MAX_ROW)
            raise csv.Error(f"a row of more than {MAX_ROW:,} characters, or a quote that is not closed")
        return line


def _opened(path: Path) -> IO[str]:
    """Open a text in the encoding of its mark, or as UTF-8; a byte of no character becomes a lone surrogate."""
    with path.open("rb") as file:
        start = file.read(3)
    encoding = next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), "utf-8")
    return path.open(encoding=encoding, errors="surrogateescape", newline="")


def _is_text(row: Sequence[str]) -> bool:
    """Return false if a text has a lone surrogate."""
    return not any("\ud800" <= letter <= "\udfff" for text in row if not text.isascii() for letter in text)
