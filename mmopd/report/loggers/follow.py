"""The process of a logger: `python -m mmopd.report.loggers.follow NAME RUN`. `start` starts and ends it.

It sends each step once its line is in `metrics.jsonl`, and the results when it is asked to end (SIGTERM). What fails is
counted, and said once in its log. Metrics that could not be sent are tried again; the run itself never waits.
"""

import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mmopd.evaluate.table import Results
from mmopd.report.heatmap import TokenRow
from mmopd.report.loggers import state
from mmopd.report.loggers.base import Logger
from mmopd.report.loggers.registry import LOGGERS
from mmopd.report.metrics import Tail
from mmopd.runtime import logs
from mmopd.runtime.run_folder import RunFolder

logger = logging.getLogger("mmopd.report.loggers.follow")

EVERY = 1.0  # seconds between looks at the files
RETRY = 600.0  # the longest time between two attempts
LATE = 120.0  # seconds of a call after which it counts as failed, though it goes on


class Follower:
    """Sends a run to one logger.

    Args:
        kind: of the logger.
        run: the run folder.
        file: of the state.
    """

    def __init__(self, kind: type[Logger], run: Path, file: Path) -> None:
        self.state = state.load(file)
        self._kind = kind
        self._run = run
        self._file = file
        self._logger: Logger | None = None
        files = RunFolder(run)
        self._metrics = Tail(files.metrics)
        self._samples = Tail(files.samples)
        self._results = files.results
        self._waiting: deque[dict[str, Any]] = deque()
        self._rows: list[TokenRow] = []
        if not kind.keeps:
            self.state.steps = 0

    def follow(self, stop: threading.Event) -> None:
        """Send what is written until `stop` is set, then the rest of it, and close."""
        failures = 0
        while True:
            ending = stop.is_set()  # before the files are read, so that nothing is missed
            failures = 0 if self.send() else failures + 1
            if ending:
                break
            stop.wait(min(EVERY * 2**failures, RETRY))
        if self._logger is not None:
            if self._results.is_file():
                self._try(partial(self._logger.results, self.state.steps, Results.read(self._results)), "results")
            self._try(self._logger.close, "close")

    def send(self) -> bool:
        """Send the steps that are new; return false if that failed."""
        self._read()
        if self._logger is None and not self._try(self._open, "start"):
            return False
        service = self._open()
        while self._waiting:
            step = self._waiting[0]["step"]
            if step >= self.state.steps:
                values = {k: v for k, v in self._waiting[0].items() if k != "step" and v is not None}
                if not self._try(partial(service.metrics, step, values), "metrics"):
                    return False
                # A table that a service refuses is not tried again: it would hold up the metrics behind it.
                if rows := [row for row in self._rows if row.step == step]:
                    self._try(partial(service.samples, step, rows), "samples")
                self.state.steps = step + 1
                state.save(self._file, self.state)
            self._waiting.popleft()
        return True

    def _read(self) -> None:
        """Read what is new; after a resume has removed steps, start over if the logger does not keep them."""
        lines, again = self._metrics.read()
        if again:
            self._waiting.clear()
            if not self._kind.keeps and self._logger is not None:
                self._try(self._logger.close, "close")
                self._logger = None
                self.state.steps = 0
        self._waiting.extend(lines)
        rows, again = self._samples.read()
        self._rows = [] if again else [row for row in self._rows if row.step >= self.state.steps]
        self._rows += [TokenRow(**row) for row in rows]

    def _open(self) -> Logger:
        """Return the logger; the run at the service is started or continued at the first call."""
        if self._logger is None:
            self._logger = self._kind(self._run, self.state.id)
            self.state.id = self._logger.id
            state.save(self._file, self.state)
        return self._logger

    def _try(self, call: Callable[[], object], what: str) -> bool:
        """Call the service; return false if it failed, which is counted."""
        late = threading.Timer(LATE, self._failed, (f"{what}: no answer for {LATE:.0f} s",))
        late.daemon = True
        late.start()
        try:
            call()
        except Exception as error:  # whatever a service's package raises
            self._failed(f"{what}: {type(error).__name__}: {error}", error)
            return False
        finally:
            late.cancel()
        return True

    def _failed(self, text: str, error: Exception | None = None) -> None:
        if text != self.state.error:
            logger.error("%s; metrics are tried again", text, exc_info=error)
        self.state.failed += 1
        self.state.error = text
        state.save(self._file, self.state)


def main() -> None:
    """Follow the run until SIGTERM."""
    name, run = sys.argv[1], Path(sys.argv[2])
    logs.start(f"logger-{name}")
    os.nice(10)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    Follower(LOGGERS[name], run, run / state.FOLDER / f"{name}.json").follow(stop)


if __name__ == "__main__":
    main()
