"""Result of a check of the machine or of a server, and the table that shows the results."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report; `way_out` is empty if nothing needs to be done."""

    name: str
    state: State
    found: str
    way_out: str = ""
    of: str = ""  # the server or the teacher that was checked; empty for this machine
    numbers: Mapping[str, float] = field(default_factory=dict)  # measured values, by name


def ok(found: str, **numbers: float) -> Check:
    """Return a check that has passed; its `name` and `of` are set later, as for `fail`."""
    return Check("", "ok", found, numbers=numbers)


def fail(found: str, way_out: str, **numbers: float) -> Check:
    """Return a check that has failed."""
    return Check("", "fail", found, way_out, numbers=numbers)


def to_dict(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the checks as JSON types; `ok` is false if one failed."""
    return {"ok": all(check.state != "fail" for check in checks), "checks": [asdict(check) for check in checks]}


def render(checks: Sequence[Check], console: Console, title: str = "What this machine can do") -> None:
    """Print the checks as a table; the way out is on a separate line below what was found."""
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
