"""Cache of scores on disk, so that a run that is killed and resumed does not request them again.

If engines repeat (docs/repetition.md), a resumed run rolls out the same responses after its last checkpoint; a response
that differs is scored again. Each rank appends to its own file. At the start all files are read, also those of more or
fewer ranks. Earlier scores are useless after a checkpoint, which empties the files.
"""

import os
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import Self

KEY = 16  # bytes
# Key, number of tokens; then one float32 per token, the precision in which a server computes.
HEAD = struct.Struct(f"<{KEY}sI")
MAX_BYTES = 1 << 31  # largest file; more is not kept


class ScoreCache:
    """Log-probs by key, in `FOLDER/scores-RANK.bin`. A context manager."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._own = folder / f"scores-{rank}.bin"
        self._places: dict[bytes, tuple[int, int, int]] = {}  # key -> file, offset, tokens
        self._files: list[int] = []

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._writer = os.open(self._own, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        for path in sorted(self._folder.glob("scores-*.bin")):
            file = self._writer if path == self._own else os.open(path, os.O_RDONLY)
            self._files.append(file)
            whole = self._read(file)
            if file == self._writer:
                os.ftruncate(file, whole)  # drops a record that a kill cut short
        self._size = os.fstat(self._writer).st_size
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            os.close(file)

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: bytes) -> tuple[float, ...] | None:
        """Return the log-probs kept under a key; None if there are none."""
        if (place := self._places.get(key)) is None:
            return None
        file, offset, tokens = place
        values = array("f", os.pread(file, 4 * tokens, offset))
        return tuple(values) if len(values) == tokens else None  # None: another rank has emptied its file

    def add(self, key: bytes, logprobs: tuple[float, ...]) -> None:
        """Keep log-probs, unless the file is full."""
        record = HEAD.pack(key, len(logprobs)) + array("f", logprobs).tobytes()
        if self._size + len(record) <= MAX_BYTES:
            os.write(self._writer, record)
            self._size += len(record)

    def clear(self) -> None:
        """Remove everything, in memory and on disk, because a later checkpoint exists."""
        self._places.clear()
        os.ftruncate(self._writer, 0)
        self._size = 0

    def _read(self, file: int) -> int:
        """Record the offsets of the complete records; return their total length in bytes."""
        size = os.fstat(file).st_size
        at = 0
        while at + HEAD.size <= size:
            key, tokens = HEAD.unpack(os.pread(file, HEAD.size, at))
            if at + HEAD.size + 4 * tokens > size:
                break
            self._places[key] = file, at + HEAD.size, tokens
            at += HEAD.size + 4 * tokens
        return at
