"""Arguments and options that several commands of the command line have."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console(emoji=False, highlight=False)


def progress_console(as_json: bool) -> Console:
    """Return the console for progress: stderr if stdout is for JSON."""
    return Console(stderr=True, highlight=False) if as_json else console


def print_json(data: Any) -> None:
    """Print a value as JSON on stdout, and nothing else."""
    console.print_json(data=data, highlight=False, ensure_ascii=True, allow_nan=False)


def complete(*kinds: str) -> Callable[[str], list[str]]:
    """Return the completion of names such as recipes/demo.yaml, shipped ones included; a shell adds other files."""

    def names(incomplete: str) -> list[str]:
        from mmopd import workspace

        return [name for kind in kinds for name in workspace.names(kind) if name.startswith(incomplete)]

    return names


RecipeArgument = Annotated[
    Path,
    typer.Argument(
        help="A recipe file, such as recipes/demo.yaml.", show_default=False, autocompletion=complete("recipes")
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as train.steps=20.", show_default=False),
]
RunOption = Annotated[
    Path | None,
    typer.Option("--run", help="The run folder to make. [default: runs/NAME-DATE-TIME]", show_default=False),
]
EndpointsOption = Annotated[
    list[Path] | None,
    typer.Option(help="A file written by `mmopd serve`: use the teachers in it; may be repeated.", show_default=False),
]
HostOption = Annotated[
    str, typer.Option(help="Address that the servers listen on; 0.0.0.0 means all addresses of this machine.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for scripts; progress goes to stderr.")]
