"""Seconds of the parts of a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mmopd.runtime.watchdog import Watchdog


class Clock:
    """Measures the seconds of each part of a step."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.seconds: dict[str, float] = {}
        self._watchdog = watchdog
        self._begin = time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time one part."""
        self._watchdog.beat(f"{self._watchdog.where.partition(',')[0]}, {part}")
        begin = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - begin

    @property
    def step(self) -> tuple[float, float]:
        """Seconds of the step so far, and of the checkpoint before it, which do not count in the first."""
        saved = self.seconds.get("checkpoint", 0.0)
        return time.perf_counter() - self._begin - saved, saved

    def metrics(self) -> dict[str, float]:
        """Return the seconds of the parts, and of the whole step so far."""
        return {"seconds": time.perf_counter() - self._begin} | {
            f"seconds/{part}": s for part, s in self.seconds.items()
        }
