"""The rows of a growing metrics.jsonl, read as they are appended."""

import os
from typing import Any

from mmopd.report.run_files import LeftOut, Metrics, object_of, values_of
from mmopd.runtime.run_folder import RunFolder

CHUNK = 16 * 2**20  # bytes that are read at a time; the next call goes on
MOST = 4000  # rows that are kept
RECENT = 50  # last rows that are kept in any case


class GrowingMetrics:
    """Reads what is appended to the metrics of a run; of many steps, evenly spaced ones are kept.

    A line that has no end yet is read later. Damaged lines are named in `left_out`.
    """

    def __init__(self, run: RunFolder) -> None:
        self.left_out = LeftOut()
        self.version = 0  # changes with the rows
        self._path = run.metrics
        self._start()

    def _start(self) -> None:
        self._inode = 0
        self._begin = 0  # bytes read so far
        self._lines = 0
        self._every = 1  # steps between rows that are kept
        self._rows: dict[int, dict[str, float | None]] = {}

    def read(self) -> Metrics:
        """Return the rows so far, in order of their steps."""
        try:
            if self._path.is_file():
                self._read()
        except OSError as error:
            self._say(f"cannot be read: {error.strerror}")
        return [self._rows[step] for step in sorted(self._rows)]

    def _read(self) -> None:
        with self._path.open("rb") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._inode or about.st_size < self._begin:  # a resume has removed steps
                self._start()
                self.left_out = LeftOut()
                self._inode = about.st_ino
                self.version += 1
            file.seek(self._begin)
            text = file.read(CHUNK)
        whole, newline, _ = text.rpartition(b"\n")
        if not newline and len(text) == CHUNK:
            self._say(f"{CHUNK:,} bytes without the end of a line")
            self._begin += len(text)
            return
        self._begin += len(whole + newline)
        self.version += bool(newline)
        for line in whole.split(b"\n") if newline else []:
            self._lines += 1
            try:
                step, values = values_of(object_of(line))
            except ValueError as error:
                self._say(f"line {self._lines}: {error}")
            else:
                self._rows[step] = values
        self._thin()

    def _thin(self) -> None:
        while self._every > 1 or len(self._rows) > MOST:
            recent = sorted(self._rows)[-RECENT:][0]
            self._rows = {s: row for s, row in self._rows.items() if s % self._every == 0 or s >= recent}
            if len(self._rows) <= MOST:
                break
            self._every *= 2

    def _say(self, what: str) -> None:
        self.left_out.add(self._path.name, what)


def faults_of(rows: Metrics, number: int) -> list[dict[str, Any]]:
    """Return what failed in the last steps in which something did, newest first."""
    from mmopd.runtime.step_lines import FAULTS

    found = []
    for row in reversed(rows):
        said = [f"{row[key]:,.0f} {what}" for key, what in FAULTS.items() if row.get(key)]
        said += [
            f"{value:,.0f} requests to teachers failed ({name.rpartition('/')[2]})"
            for name, value in row.items()
            if name.startswith("scoring/failed/") and value
        ]
        if said:
            found.append({"step": row["step"], "text": ", ".join(said)})
        if len(found) == number:
            break
    return found
