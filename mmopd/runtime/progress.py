"""Progress of a run on the terminal: one line per stage, with a bar if there is something to count.

On a terminal the lines are updated in place; without one, each stage prints a line when it begins and when it ends.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mmopd.runtime.time_left import TimeLeft

logger = logging.getLogger(__name__)

LOG_EVERY = 10.0  # seconds between lines of one stage without a terminal


class Stage:
    """A running stage: `total`, `advance` and `note` change its display."""

    def __init__(self, stages: "Stages", title: str) -> None:
        self.title = title
        self.outcome = ""
        self._stages = stages
        self.begin = time.monotonic()
        self.done = 0
        self.count = 0
        self._already = 0  # items that were done before this stage began
        self._first: tuple[float, int] | None = None  # when the first items were counted here, and how many there were
        self._bar: TaskID = stages.progress.add_task(title, total=None)
        self._logged = time.monotonic()

    def total(self, total: int, done: int = 0) -> None:
        """Set the number of items to count."""
        if not self.count:
            self._already = done
        self.count = total
        self._counted(done)
        self._stages.progress.update(self._bar, total=total, completed=done)

    def advance(self, by: int = 1) -> None:
        """Count more items as done."""
        self._counted(self.done + by)
        self._stages.progress.update(self._bar, completed=self.done)

    def _counted(self, done: int) -> None:
        self.done = done
        if self._first is None and done > self._already:
            self._first = time.monotonic(), done

    def left(self) -> float | None:
        """Return the seconds that the rest of the items need at the pace since the first; None before the second."""
        if self._first is None or self.done <= self._first[1]:
            return None
        since, first = self._first
        return (time.monotonic() - since) / (self.done - first) * (self.count - self.done)

    def show(self, text: str) -> None:
        """Show the current activity under the bars of a terminal."""
        self._stages.say(text)

    def note(self, text: str) -> None:
        """Show the current activity: under the bars of a terminal, otherwise as a line every 10 s."""
        self.show(text)
        if time.monotonic() - self._logged > LOG_EVERY:
            self.log(text)

    def log(self, text: str) -> None:
        """Print a line with the count and the time left, unless the output is a terminal, which shows both."""
        if self._stages.console.is_terminal:
            return
        self._logged = time.monotonic()
        count = f" {self.done}/{self.count}" if self.count else ""
        left = self._stages.left()
        said = "; ".join(text.splitlines())
        line = f"  {self.title}{count}: {said}" + (f"  {left}" if left else "")
        self._stages.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def finish(self, seconds: float, ok: bool) -> None:
        """Replace the bar by a line."""
        self._stages.progress.remove_task(self._bar)
        self._stages.say("")
        mark = "[green]✓[/]" if ok else "[red]✗[/]"
        logger.info(
            "%s: %s in %.1f s%s",
            self.title,
            "done" if ok else "failed",
            seconds,
            f", {self.outcome}" if self.outcome else "",
        )
        tail = f"  [dim]{escape(self.outcome)}[/]" if self.outcome else ""
        self._stages.console.print(f"{mark} {escape(self.title)}  [cyan]{seconds:.1f} s[/]{tail}", highlight=False)


class Stages:
    """Stages of a run, in order; writes the time of each to `timings`."""

    def __init__(self, console: Console, timings: Path | None = None) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self.servers: dict[str, str] = {}  # what happened last to each server
        self._running: Stage | None = None
        self._time_left = TimeLeft({})
        self.progress = Progress(
            SpinnerColumn("line" if console.options.ascii_only else "dots"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._timings = timings
        self._note = Text("")
        self._live = Live(console=console, refresh_per_second=4, transient=True, get_renderable=self._shown)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def expect(self, usual: Mapping[str, float]) -> None:
        """Take the usual seconds of all stages, in order, from which the time left is estimated."""
        self._time_left = TimeLeft(usual)

    def left(self) -> str:
        """Return the time that is left as words; empty if nothing is known of it."""
        if (stage := self._running) is None:
            return ""
        now = stage.left()
        if now is None:
            now = self._time_left.of_stage(stage.title, time.monotonic() - stage.begin)
        if now is None:
            return ""
        later = self._time_left.after(stage.title)
        return f"{duration(now)} left of {stage.title}" if later is None else f"about {duration(now + later)} left"

    def now(self) -> dict[str, Any]:
        """Return what goes on, as JSON values; any thread may call this."""
        found: dict[str, Any] = {"seconds": dict(self.seconds), "servers": dict(self.servers), "left": self.left()}
        if (stage := self._running) is not None:
            elapsed = round(time.monotonic() - stage.begin, 1)
            found |= {"stage": stage.title, "elapsed": elapsed, "done": stage.done, "count": stage.count}
            found["note"] = self._note.plain
        return found

    def _shown(self) -> Group:
        return Group(self.progress, self._note, Text(self.left(), style="dim"))

    def say(self, text: str) -> None:
        """Set the line under the bars."""
        self._note.plain = text

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Run one stage; its time counts under `title`, and an exception marks it as failed."""
        if not self.console.is_terminal:
            self.console.print(f"… {title}", markup=False, highlight=False)
        logger.info("%s: begins", title)
        self._running = stage = Stage(self, title)
        ok = False
        try:
            yield stage
            ok = True
        finally:
            self.seconds[title] = round(time.monotonic() - stage.begin, 2)
            self._running = None
            self._time_left.finished(title, self.seconds[title])
            stage.finish(self.seconds[title], ok)
            if self._timings is not None:
                self._timings.write_text(json.dumps(self.seconds, indent=1), encoding="utf-8")


def duration(seconds: float) -> str:
    """Return a time as words: seconds up to two minutes, then minutes, then hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
