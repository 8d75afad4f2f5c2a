"""Early ends of a rank: on a stop signal after the current step, or by its own watchdog when it makes no progress.

An engine has train.timeout to answer. A rank that waits for another rank is ended by the process group a little later
(TOGETHER): the other rank may have waited for an engine, and then its log has the cause. No other process notices a
rank that hangs by itself: its watchdog writes the stacks of all threads to the log and ends the process. The watchdog
waits longest (LATER), so that it does not end a rank that only waits for a hanging one.
"""

import asyncio
import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from mmopd.runtime.logs import last_words
from mmopd.runtime.processes import STOPS

# Exit statuses of a rank.
HUNG = 124  # no progress; same status as timeout(1)
WAITED = 123  # another rank did not come to a collective
LEFT = 122  # another rank has ended
TRAINER = "trainer"  # name of the thread that computes while rollouts run ahead
ONCE = 2.0  # seconds in which a repeated signal is one request
# Factors of train.timeout: for a rank that waits for others, for the watchdog, and for the launcher, in case a watchdog
# has stopped too.
TOGETHER = 1.1
LATER = 1.2
LAST = 1.5


class Watchdog:
    """Ends this process when nothing calls `beat` for LATER times `timeout` seconds.

    A thread watches while the `with` block lasts.

    Args:
        rank: number of this rank, for messages.
        timeout: train.timeout of the recipe, in seconds.
        pulse: a file that the thread touches as long as it runs.
    """

    def __init__(self, rank: int, timeout: float, pulse: Path) -> None:
        self._rank = rank
        self._limit = LATER * timeout
        self._pulse = pulse
        self._last = time.monotonic()
        self._over = threading.Event()
        self._loop_counts = True
        self.where = "start"  # current activity of the rank, for messages

    def __enter__(self) -> Self:
        self.beat()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def beat(self, where: str | None = None) -> None:
        """Record progress.

        Args:
            where: the activity that begins now.
        """
        self._last = time.monotonic()
        self.where = where or self.where

    def beat_with(self, loop: asyncio.AbstractEventLoop) -> None:
        """Record progress as long as an event loop runs; what it waits for, such as a server, has a time limit."""
        if self._loop_counts:
            self.beat()
        if not self._over.is_set():
            loop.call_later(self._limit / 20, self.beat_with, loop)

    @contextmanager
    def without_loop(self) -> Iterator[None]:
        """Ignore the event loop while the block lasts: the progress of the trainer's thread counts instead."""
        self._loop_counts = False
        try:
            yield
        finally:
            self._loop_counts = True

    def _watch(self) -> None:
        while not self._over.wait(self._limit / 20):
            with suppress(OSError):
                self._pulse.touch()
            silent = time.monotonic() - self._last
            if silent > self._limit:
                said = f"rank {self._rank} has made no progress for {silent:.0f} s, at {self.where}; it was here:"
                aside = (
                    [t for t in threading.enumerate() if t.name.startswith(TRAINER)] if not self._loop_counts else []
                )
                busy = (aside or [threading.main_thread()])[0]
                where = "".join(_stack(sys._current_frames()[busy.ident or 0]))
                last_words(self._pulse.stem, f"{_all_stacks()}{said}\n{where}")
                os._exit(HUNG)


def pulse_of(log: Path) -> Path:
    """Return the file by which the watchdog of the rank with this log shows that it is alive."""
    return log.with_suffix(".pulse")


def _all_stacks() -> str:
    """Return the stacks of all threads in the format of faulthandler."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def _stack(frame: FrameType) -> list[str]:
    """Return the innermost lines of a stack, which become the last lines of the log."""
    import traceback

    return traceback.format_list(traceback.extract_stack(frame)[-6:])


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """Yield an event that a stop signal sets instead of ending this process; the same signal again, later, ends it.

    A scheduler that signals every process reaches a rank directly and once more through the launcher.
    """
    asked = threading.Event()
    first: dict[int, float] = {}

    def ask(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - first.setdefault(number, now) > ONCE:
            raise SystemExit(128 + number)
        asked.set()

    before = {number: signal.signal(number, ask) for number in STOPS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
