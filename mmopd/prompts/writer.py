"""Writes rows as numbered tars of bounded size, each with its index."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

from webdataset import TarWriter

from mmopd.errors import DataError, UserError
from mmopd.prompts.index import index_path, index_tar
from mmopd.prompts.rows import RowError, pack
from mmopd.prompts.shards import Shards
from mmopd.prompts.tokens import Counter
from mmopd.records import Prompt

MAX_ROWS = 10_000
MAX_BYTES = 1 << 28


class ShardWriter:
    """Appends rows to tars `00000.tar`, `00001.tar`, ... of a folder.

    A tar is closed at `max_rows` rows or `max_bytes` of content. Leaving a `with` block by an exception closes the open
    file without finishing the tar.

    Args:
        shards: number of tars that exist already.
        rows: number of rows in them. The tar key of a row is its number.
    """

    def __init__(
        self, folder: Path, *, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES, shards: int = 0, rows: int = 0
    ) -> None:
        self._folder = folder
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._shards = shards
        self.rows = rows
        self._writer: TarWriter | None = None
        self._in_shard = self._content = 0

    def add(self, members: Mapping[str, bytes]) -> Path | None:
        """Append a row (extension -> content); return the tar if this row closed it."""
        if self._writer is None:
            self._in_shard = self._content = 0
            self._writer = TarWriter(str(self._path()), encoder=False, mtime=0, compress=False)
        self._content += self._writer.write({"__key__": f"{self.rows:08d}", **members})
        self.rows += 1
        self._in_shard += 1
        return self.close() if self._in_shard >= self._max_rows or self._content >= self._max_bytes else None

    def close(self) -> Path | None:
        """Finish the open tar and return it; None if no tar is open."""
        if self._writer is None:
            return None
        self._writer.close()
        self._writer = None
        self._shards += 1
        return self._folder / f"{self._shards - 1:05d}.tar"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def _path(self) -> Path:
        return self._folder / f"{self._shards:05d}.tar"


def publish(partial: Path, tars: list[Path], folder: Path) -> Shards:
    """Rename the tars of a complete source to `shard-00000-of-00002.tar`, ... and move the folder to its place."""
    for number, tar in enumerate(tars):
        named = partial / f"shard-{number:05d}-of-{len(tars):05d}.tar"
        index_path(tar).rename(index_path(named))
        tar.rename(named)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return Shards(folder)


def check_free(folder: Path) -> None:
    """Refuse to write into a folder that is not empty.

    Raises:
        UserError: the folder is not empty, or is a file.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already there; remove it to write the source again")


def partial_folder(folder: Path) -> Path:
    """Return the folder in which a source is written until it is complete."""
    return folder.with_name(f".{folder.name}.partial")


def write_shards(
    rows: Iterable[Prompt],
    folder: Path,
    *,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    counter: Counter | None = None,
) -> Shards:
    """Write rows as `shard-00000-of-00002.tar`, ... with their indices; the folder appears when it is complete.

    The tar key is the row number; a prompt's own key is kept in the json as `id`. The same rows give the same bytes.

    Args:
        max_rows: rows of a shard, at most.
        max_bytes: bytes of content after which a shard is closed.
        counter: counts the tokens of each row for the index; without one they are not counted.

    Raises:
        UserError: the folder is not empty.
        DataError: there are no rows, or a row is not well formed; names the row.
    """
    check_free(folder)
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)  # left over from an interrupted call
    partial.mkdir(parents=True)
    try:
        with ShardWriter(partial, max_rows=max_rows, max_bytes=max_bytes) as writer:
            tars = [tar for tar in (*_write(rows, writer), writer.close()) if tar is not None]
        if not tars:
            raise DataError(f"{folder}: there are no rows to write")
        for tar in tars:
            index_tar(tar, counter)
        return publish(partial, tars, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(rows: Iterable[Prompt], writer: ShardWriter) -> Iterator[Path | None]:
    for number, row in enumerate(rows):
        try:
            yield writer.add(pack(row, decode=True))
        except RowError as error:
            raise DataError(f"row {number} ({row.key or 'no key'}): {error}") from None
