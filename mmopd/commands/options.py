"""Arguments and options that several commands of the command line have."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console(highlight=False)

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe file, such as recipes/demo.yaml.", show_default=False)]
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
