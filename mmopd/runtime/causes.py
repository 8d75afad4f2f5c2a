"""The cause of a process's end, read from its log: its error in its own words, without the traceback."""

import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from mmopd.runtime.logs import PREFIX

LAST_LINES = 12
MOST_LINES = 20  # of an error; the stack of a rank that hangs is the longest
TRACEBACK = "Traceback (most recent call last):"
_CHAIN = ("During handling of the above exception", "The above exception was the direct cause")
_VLLM = re.compile(r"^\(\S+ pid=\d+\) (?:[A-Z]+ \S+ \S+ \[[^\]]*\] ?)?")
_ERROR = re.compile(r"Z (?:ERROR|CRITICAL) ")
_POINTS_BACK = re.compile(r"(?i)see .*root cause|^SystemExit")  # vLLM's errors about an error, and a plain end


class Line(NamedTuple):
    """A line of a log."""

    record: str  # its prefix, which all lines of one record share; empty for plain output
    text: str


def why(log: Path, begin: int = 0, *, by_signal: bool = False) -> str:
    """Return why a process ended, as the end of a message: the error in its log or, without one, the last lines.

    Args:
        log: its output.
        begin: bytes of the log that were there before it started; they are ignored.
        by_signal: a signal ended it, or it still runs: an error in its log is no cause.
    """
    lines = list(_lines(log, begin))
    if not by_signal and (error := _error(lines)):
        return f"its error, in {log}:\n{error}"
    said = [line.text for line in lines if line.text.strip() and not line.text.startswith((" ", TRACEBACK))]
    return f"the last lines of {log}:\n" + "\n".join(list(dict.fromkeys(said))[-LAST_LINES:] or ["(none)"])


def _lines(log: Path, begin: int) -> Iterator[Line]:
    """Yield the lines of a log; their prefixes are those of `mmopd.runtime.logs` or of vLLM."""
    if not log.is_file():
        return
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace")
    for line in text.splitlines():
        found = PREFIX.match(line) or _VLLM.match(line)
        yield Line(found[0] if found else "", line[found.end() :] if found else line)


def _error(lines: list[Line]) -> str:
    """Return the error that ended the process; empty if none was logged.

    It is our own last record of an error. Otherwise it is the last exception that does not only point to another one.
    """
    records = [
        [line.text for line in group]
        for record, group in groupby(lines, lambda line: line.record)
        if _ERROR.search(record)
    ]
    ours = [_last_exception(record) or record for record in records[-1:]]
    others = [error for error in _exceptions(lines) if not _POINTS_BACK.search(error[0])] if not ours else []
    return "\n".join(next(iter(ours or others[-1:]), [])[-MOST_LINES:])


def _last_exception(record: list[str]) -> list[str]:
    return next(iter(list(_exceptions([Line("", text) for text in record]))[-1:]), [])


def _exceptions(lines: list[Line]) -> Iterator[list[str]]:
    """Yield the message of each exception whose traceback is in the log."""
    for start, line in enumerate(lines):
        if not line.text.startswith(TRACEBACK):
            continue
        rest = [other for other in lines[start + 1 : start + 2000] if other.record == line.record]
        frames = next((i for i, other in enumerate(rest) if other.text.strip() and other.text[0] != " "), len(rest))
        message = []
        for _, text in rest[frames:]:
            if not text.strip() or text.startswith((TRACEBACK, *_CHAIN)):
                break
            message.append(text)
        if message:
            yield message[:LAST_LINES]
