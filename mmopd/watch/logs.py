"""The ends of the logs of a run: the last lines of one, and the warnings and errors of all."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from mmopd.report.run_files import short
from mmopd.runtime.logs import PREFIX

TAIL = 64 << 10  # bytes of a log that are shown
SEARCHED = 256 << 10  # bytes at the end of each log in which warnings are looked for
LINES = 300
LINE = 2000  # characters of a line
FAULT = 1500  # characters of a warning or an error
FAULTS = 40
FILES = 100
OURS = ("launcher.", "rank", "logger-", "servers.", "watch.")  # beginnings of names of logs without vLLM's own lines
FIRST = ("launcher", "rank", "student", "servers")  # beginnings of names, in the order of the list
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")
_VLLM = re.compile(r"^(?:\([^)]*\) )?(WARNING|ERROR|CRITICAL) ")
LEVELS = {"WARNING": "warning", "ERROR": "error", "CRITICAL": "error"}


@dataclass(frozen=True, slots=True)
class Fault:
    """A warning or an error in a log."""

    time: str  # UTC
    level: str  # warning | error
    process: str
    text: str


def log_names(logs: Path) -> list[str]:
    """Return the names of the logs of a run, that of the launcher first."""
    try:
        with os.scandir(logs) as entries:
            names = [e.name for e in entries if e.name.endswith(".log") and e.is_file(follow_symlinks=False)]
    except OSError:
        return []

    def place(name: str) -> tuple[int, str]:
        return next((i for i, begin in enumerate(FIRST) if name.startswith(begin)), len(FIRST)), name

    return sorted(names, key=place)[:FILES]


def searched(logs: Path) -> list[Path]:
    """Return the logs in which warnings and errors are looked for: those of the launcher, the ranks and the loggers."""
    return [logs / name for name in log_names(logs) if name.startswith(OURS)]


def last_lines(path: Path) -> list[tuple[str, str]]:
    """Return the last lines of a log, each with its level: warning, error, or nothing."""
    level = ""
    found = []
    for line in _tail(path, TAIL):
        if match := PREFIX.match(line) or _VLLM.match(line):
            level = LEVELS.get(match["level"] if match.re is PREFIX else match[1], "")
        elif not line.startswith((" ", "\t")):
            level = ""
        found.append((level, short(line, LINE)))
    return found[-LINES:]


def faults(logs: Path) -> list[Fault]:
    """Return the newest warnings and errors, newest first.

    The logs of vLLM's servers are left out: the launcher says what happens to a server.
    """
    found = [fault for path in searched(logs) for fault in _faults(path)]
    return sorted(found, key=lambda fault: fault.time, reverse=True)[:FAULTS]


def _faults(path: Path) -> Iterator[Fault]:
    """Yield the records of a log at WARNING and above; those of the supervisor of servers from ERROR up."""
    records = ((match, line[match.end() :]) for line in _tail(path, SEARCHED) if (match := PREFIX.match(line)))
    for _, group in groupby(records, key=lambda record: record[0][0]):
        matches, lines = zip(*group, strict=True)
        level = LEVELS.get(matches[0]["level"])
        if level and (level == "error" or not path.name.startswith("servers")):
            text = "\n".join(lines)
            yield Fault(matches[0]["time"], level, matches[0]["process"], text if len(text) <= FAULT else _ends(text))


def _ends(text: str) -> str:
    """Return the beginning and, with the error itself, the end of a long record."""
    return f"{text[: FAULT // 3]}\n…\n{text[-2 * FAULT // 3 :]}"


def _tail(path: Path, size: int) -> list[str]:
    """Return the last lines of a file, without control characters; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            begin = max(0, file.seek(0, os.SEEK_END) - size)
            file.seek(begin)
            text = file.read(size).decode("utf-8", "replace")
    except OSError:
        return []
    lines = text.removesuffix("\n").split("\n")[bool(begin) :]
    return [_CONTROL.sub("", line.rpartition("\r")[2]) for line in lines]
