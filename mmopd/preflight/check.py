"""A check of the machine or of a server, and the table in which a person reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report; `way_out` is empty where nothing needs doing."""

    name: str
    state: State
    found: str
    way_out: str = ""
    of: str = ""  # the server or the teacher that it is about; empty for this machine
    numbers: Mapping[str, float] = field(default_factory=dict)  # what was measured, by name


def ok(found: str, **numbers: float) -> Check:
    """A check that has been passed; its name and whom it is about are filled in later, as in `fail`."""
    return Check("", "ok", found, numbers=numbers)


def fail(found: str, way_out: str, **numbers: float) -> Check:
    """A check that has not."""
    return Check("", "fail", found, way_out, numbers=numbers)


def render(checks: Sequence[Check], console: Console, title: str = "What this machine can do") -> None:
    """Print the report as a table; what to do stands on a line of its own, under what was found."""
    marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}
    servers = any(check.of for check in checks)
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("", *["server"] * servers, "what", "found"):
        table.add_column(column, overflow="fold", no_wrap=column == "what")
    before = ""
    for check in checks:
        way_out = f"\n[bold]→[/] {escape(check.way_out)}" if check.way_out else ""
        server = [escape(check.of) if check.of != before else ""] * servers
        table.add_row(marks[check.state], *server, check.name, escape(check.found) + way_out)
        before = check.of
    console.print(table)
