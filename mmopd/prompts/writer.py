"""Writes rows as numbered tars of bounded size, each with its index."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

from webdataset import TarWriter

from mmopd.errors import UserError
from mmopd.prompts.index import index_path, index_tar
from mmopd.prompts.rows import RowError, pack
from mmopd.prompts.shards import Shards
from mmopd.prompts.tokens import Counter
from mmopd.records import Prompt

MAX_ROWS = 10_000
MAX_BYTES = 1 << 28


class ShardWriter:
    """Appends rows to tars `00000.tar`, `00001.tar`, ... of a folder; a tar is closed when it has `max_rows`, or
    `max_bytes` of content.

    The end of a `with` block that is left by an exception closes the file, but does not finish it.

    Args:
        shards: tars that are there already.
        rows: rows in them. The tar key of a row is its number.
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
        """Append a row (extension -> content); returns the tar if that closed it."""
        if self._writer is None:
            self._in_shard = self._content = 0
            self._writer = TarWriter(str(self._path()), encoder=False, mtime=0, compress=False)
        self._content += self._writer.write({"__key__": f"{self.rows:08d}", **members})
        self.rows += 1
        self._in_shard += 1
        return self.close() if self._in_shard >= self._max_rows or self._content >= self._max_bytes else None

    def close(self) -> Path | None:
        """End the tar that is open; returns it."""
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
    """Give the tars of a complete source their names, `shard-00000-of-00002.tar`, and the folder its place."""
    for number, tar in enumerate(tars):
        named = partial / f"shard-{number:05d}-of-{len(tars):05d}.tar"
        index_path(tar).rename(index_path(named))
        tar.rename(named)
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return Shards(folder)


def check_free(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        UserError: the folder has something in it.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already there; remove it to write the source anew")


def partial_folder(folder: Path) -> Path:
    """Where a source is written before it is complete."""
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
        counter: counts the tokens of each row for the index; they are not counted without one.

    Raises:
        UserError: the folder has something in it, there are no rows, or a row is not well formed; names the row.
    """
    check_free(folder)
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)  # a rest of an interrupted call
    partial.mkdir(parents=True)
    try:
        with ShardWriter(partial, max_rows=max_rows, max_bytes=max_bytes) as writer:
            tars = [tar for tar in (*_write(rows, writer), writer.close()) if tar is not None]
        if not tars:
            raise UserError(f"{folder}: there are no rows to write")
        for tar in tars:
            index_tar(tar, counter)
        return publish(partial, tars, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(rows: Iterable[Prompt], writer: ShardWriter) -> Iterator[Path | None]:
    for number, row in enumerate(rows):
        try:
            yield writer.add(pack(row))
        except RowError as error:
            raise UserError(f"row {number} ({row.key or 'no key'}): {error}") from None
