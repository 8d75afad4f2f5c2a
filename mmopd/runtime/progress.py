"""Progress of a run on the terminal: one line per stage, with a bar if there is something to count.

On a terminal the lines are updated in place; without one, each stage prints a line when it begins and when it ends.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

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

logger = logging.getLogger(__name__)

LOG_EVERY = 10.0  # seconds between lines of one stage without a terminal


class Stage:
    """A running stage: `total`, `advance` and `note` change its display."""

    def __init__(self, stages: "Stages", title: str) -> None:
        self.title = title
        self.outcome = ""
        self._stages = stages
        self._bar: TaskID = stages.progress.add_task(title, total=None)
        self._done = 0
        self._total = 0
        self._logged = time.monotonic()

    def total(self, total: int, done: int = 0) -> None:
        """Set the number of items to count."""
        self._total = total
        self._done = done
        self._stages.progress.update(self._bar, total=total, completed=done)

    def advance(self, by: int = 1) -> None:
        """Count more items as done."""
        self._done += by
        self._stages.progress.update(self._bar, completed=self._done)

    def note(self, text: str) -> None:
        """Show the current activity under the bars."""
        self._stages.say(text)
        if not self._stages.console.is_terminal and time.monotonic() - self._logged > LOG_EVERY:
            self._logged = time.monotonic()
            count = f" {self._done}/{self._total}" if self._total else ""
            self._stages.console.print(f"  {self.title}{count}: {text}", markup=False, highlight=False)

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
        self._live = Live(Group(self.progress, self._note), console=console, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Set the line under the bars."""
        self._note.plain = text

    @contextmanager
    def stage(self, title: str) -> Iterator[Stage]:
        """Run one stage; its time counts under `title`, and an exception marks it as failed."""
        if not self.console.is_terminal:
            self.console.print(f"… {title}", markup=False, highlight=False)
        logger.info("%s: begins", title)
        stage = Stage(self, title)
        begin = time.monotonic()
        ok = False
        try:
            yield stage
            ok = True
        finally:
            self.seconds[title] = round(time.monotonic() - begin, 2)
            stage.finish(self.seconds[title], ok)
            if self._timings is not None:
                self._timings.write_text(json.dumps(self.seconds, indent=1), encoding="utf-8")
