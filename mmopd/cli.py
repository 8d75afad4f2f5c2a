"""The command line, one function for each command of `mmopd --help`. Heavy imports wait until a command needs them."""

import signal
import sys
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from mmopd import __version__
from mmopd.errors import UserError

app = typer.Typer(
    help="Distil a Qwen-VL student from several teachers, on its own rollouts, over text and images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console(highlight=False)

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe file, such as recipes/demo.yaml.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as train.steps=20.", show_default=False)
]
RunOption = Annotated[Path | None, typer.Option("--run", help="The run folder to make. [default: runs/NAME-DATE-TIME]", show_default=False)]


def main() -> None:
    """Entry point: a UserError is one message on stderr and exit status 2; SIGTERM ends like an exception, so that children are stopped."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except UserError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="The workspace to make, or to complete.", show_default=False)]) -> None:
    """Make a workspace: copy the catalogue (recipes, tasks, fleets, mixtures, suites) into FOLDER; nothing is overwritten."""
    from mmopd import catalog

    for path in catalog.init(folder):
        console.print(f"  {path}")
    console.print(f"Workspace ready. Next: cd {folder} && mmopd demo")


@app.command()
def demo(overrides: Overrides = None, run: RunOption = None) -> None:
    """The whole job on this machine, in minutes: `mmopd train recipes/demo.yaml`, with a tiny student and real parts."""
    train(Path("recipes/demo.yaml"), overrides, run)


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe file, such as recipes/demo.yaml.", show_default=False)] = None,
    overrides: Overrides = None,
    run: RunOption = None,
    resume: Annotated[Path | None, typer.Option(help="Continue this run folder from its last checkpoint.", show_default=False)] = None,
) -> None:
    """Prepare, serve, balance by difficulty, distil, evaluate and report: everything that RECIPE describes."""
    from mmopd import catalog
    from mmopd.run import RunFolder

    if (recipe is None) == (resume is None):
        raise UserError("give a recipe (mmopd train recipes/demo.yaml), or --resume with a run folder")
    if recipe is not None:
        resolved = catalog.load_recipe(recipe, overrides=overrides or ())
        folder = RunFolder(run or Path("runs") / f"{recipe.stem}-{datetime.now():%Y%m%d-%H%M%S}")
        folder.create(resolved)
    elif resume is not None:
        folder = RunFolder(resume)
        resolved = folder.recipe()
    from mmopd.launch import launch

    try:
        launch(folder, resolved, console)
    except KeyboardInterrupt:
        console.print(f"interrupted; `mmopd train --resume {folder.root}` goes on from the last checkpoint")
        raise typer.Exit(130) from None


@app.command("difficulty")
def measure_difficulty(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the picture, the weights and the logs. [default: difficulty/NAME]", show_default=False)
    ] = None,
) -> None:
    """Let the untrained student answer every prompt of RECIPE several times, and show how hard they are.

    The counts are kept beside the shards, so that a stopped pass goes on where it was, and `mmopd train` needs none of its own.
    """
    from mmopd import catalog, launch

    resolved = catalog.load_recipe(recipe, overrides=overrides or ())
    launch.difficulty_alone(resolved, out or Path("difficulty") / recipe.stem, console)


@app.command("eval")
def evaluate(
    suite: Annotated[Path, typer.Argument(help="A suite file, such as eval/demo.yaml.", show_default=False)],
    models: Annotated[list[Path], typer.Argument(help="HF folders to serve and evaluate, one row each.", show_default=False)],
    recipe: Annotated[Path, typer.Option(help="The recipe whose student engine settings are used.")] = Path("recipes/demo.yaml"),
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
) -> None:
    """Serve each of MODELS and run SUITE on it through lmms-eval; prints a table, writes results.{json,md,csv}."""
    from mmopd import catalog, launch

    launch.evaluate_models(suite, models, catalog.load_recipe(recipe), out, console)


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="HF folder of the model that the teachers were trained from.", show_default=False)],
    teachers: Annotated[list[str], typer.Argument(metavar="FOLDER[=WEIGHT]...", help="HF folders of the teachers.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The HF folder to write.", show_default=False)],
    alpha: Annotated[float, typer.Option(help="How far to go: 1 is the mean of the teachers, more goes past it (ExPO).")] = 1.25,
) -> None:
    """Merge TEACHERS and extrapolate from BASE, without training (ExPO, a baseline); one tensor in memory at a time."""
    from mmopd.merge import merge as extrapolate
    from mmopd.merge import parse_teacher
    from mmopd.progress import Stages

    with Stages(console) as stages, stages.stage("merge") as stage:
        extrapolate(base, dict(map(parse_teacher, teachers)), alpha, out, stage)
        stage.outcome = str(out)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder, finished or not.", show_default=False)]) -> None:
    """Write RUN/report.html from what the run has recorded so far."""
    from mmopd.report.html import write_report

    console.print(f"report: {write_report(run)}")


@app.command()
def show(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print the resolved RECIPE, with every default, and what it would start."""
    from mmopd import catalog
    from mmopd.show import show as print_recipe

    print_recipe(catalog.load_recipe(recipe, overrides=overrides or ()), console)


@app.command()
def doctor() -> None:
    """Say in a table what this machine can do and what is missing; exit status 1 if something needed is."""
    from mmopd.doctor import machine_report, render

    checks = machine_report()
    render(checks, console)
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
