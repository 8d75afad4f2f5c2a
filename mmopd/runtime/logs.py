"""Log format and set-up for the launcher, the ranks and the supervisor of the servers.

    2026-11-28T21:24:36.123Z WARNING rank3 step 7 was skipped
    time, UTC, milliseconds  level   process message

Every line has the prefix, also each line of a traceback or of a long message, so that `sort -s -k1,1` merges the logs
of several processes in order of time. The terminal output is not a log: `rich` prints it in `mmopd.cli` and
`mmopd.runtime.progress`.

This module loads only the standard library: the supervisor of servers on a GPU may import nothing else before it forks.
"""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from mmopd.errors import UserError

PREFIX = re.compile(r"^(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (?P<level>[A-Z]+) (?P<process>\S+) ")
OURS = "mmopd"  # logger of this package, from INFO up; libraries log from WARNING up


class Lines(logging.Formatter):
    """Formatter that puts the prefix on each line of a record.

    Args:
        process: name of this process, without blanks.
    """

    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record, joined by line ends."""
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        prefix = f"{second}.{int(record.msecs):03d}Z {record.levelname} {self.process} "
        return "\n".join(prefix + line for line in super().format(record).splitlines() or [""])


def start(process: str) -> None:
    """Log to stderr from now on, including warnings and uncaught exceptions. For the main module of a process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines(process))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger(OURS).setLevel(logging.INFO)
    logging.captureWarnings(True)
    sys.excepthook = _died
    threading.excepthook = lambda thread: _died(thread.exc_type, thread.exc_value, thread.exc_traceback)


@contextmanager
def to_file(path: Path, process: str) -> Iterator[None]:
    """Append the log of this block to a file, and the exception that ends the block."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(Lines(process))
    root = logging.getLogger()
    ours = logging.getLogger(OURS)
    before = ours.level
    ours.setLevel(logging.INFO)
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    except UserError as error:
        ours.error("%s", error)
        raise
    except BaseException as error:
        ours.error("ended by %s", type(error).__name__, exc_info=error)
        raise
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()
        ours.setLevel(before)


def last_words(process: str, text: str) -> None:
    """Write to stderr immediately and without a lock: a thread that hangs may hold the lock of `logging`."""
    record = logging.LogRecord(OURS, logging.ERROR, "", 0, text, None, None)
    os.write(2, (Lines(process).format(record) + "\n").encode(errors="backslashreplace"))


def message_of(line: str) -> str:
    """Return a line of a log without its prefix."""
    return PREFIX.sub("", line)


def _died(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt | SystemExit):
        logging.getLogger(OURS).critical("ended by an error", exc_info=(kind, error or kind(), trace))
