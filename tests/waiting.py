"""Waiting for other processes: a test waits while they write, so a busy machine is no failure; one generous limit ends
a hang.
"""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

# seconds without a byte in a log; imports alone, which write nothing, take 400 where 18 processes share two cores
SILENT = 600.0
LIMIT = 1800.0  # seconds in all


def wait_for(happened: Callable[[], object], folders: Sequence[Path] = (), every: float = 0.1) -> None:
    """Return once something has happened.

    Args:
        happened: returns True when it has.
        folders: contain the logs and metrics of the processes that it depends on.
        every: seconds between two checks.
    """
    began = since = time.monotonic()
    written = written_in(folders)
    while not happened():
        now = time.monotonic()
        if (latest := written_in(folders)) != written:
            written, since = latest, now
        assert now - since < SILENT, f"nothing is written in {[str(f) for f in folders]} for {SILENT:.0f} s"
        assert now - began < LIMIT, f"not done within {LIMIT:.0f} s"
        time.sleep(every)


class Process(Protocol):
    """A process to wait for: a `subprocess.Popen`, or a rank of `forks`."""

    def poll(self) -> int | None:
        """Return the exit status; None while it runs."""


def wait_for_exit(processes: Iterable[Process], folders: Sequence[Path] = ()) -> list[int]:
    """Return the exit statuses of processes, when all have ended."""
    running = list(processes)
    wait_for(lambda: all(process.poll() is not None for process in running), folders)
    return [status for process in running if (status := process.poll()) is not None]


def written_in(folders: Sequence[Path]) -> int:
    """Return the number of bytes in all logs and metrics below folders, while other processes add and remove files."""
    total = 0
    for folder in folders:
        for parent, _, names in os.walk(folder):  # unlike `rglob`, it ignores a folder that is removed meanwhile
            for name in names:
                if name.endswith((".log", ".jsonl")):
                    with suppress(FileNotFoundError):  # removed after it was listed
                        total += Path(parent, name).stat().st_size
    return total
