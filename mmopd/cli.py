"""The command line, one function for each command of `mmopd --help`. Heavy imports wait until a command needs them."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from mmopd import __version__
from mmopd.commands import files, machines, terminal
from mmopd.commands.inspect import inspect
from mmopd.commands.new import new
from mmopd.commands.options import (
    EndpointsOption,
    HostOption,
    JsonOption,
    Overrides,
    RecipeArgument,
    RunOption,
    complete,
    console,
    print_json,
    progress_console,
)
from mmopd.errors import STOPPED, UserError
from mmopd.runtime import python
from mmopd.runtime.processes import STOPS

app = typer.Typer(
    help="Distil a Qwen-VL student from several teachers, on its own rollouts, over text and images.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Run the command line.

    A UserError is printed as one message on stderr, with the exit status of its kind. SIGTERM, SIGUSR1 and
    SIGUSR2 end the process like an exception, so that its children are stopped.
    """
    for number in STOPS:
        signal.signal(number, _terminate)
    os.environ.update(python.environment())
    terminal.set_up()
    # Threads of torch that wait for each other sleep soon. By default they keep a core busy for up to a millisecond,
    # which on a busy machine is the core that the other thread needs: with 4 other processes on 2 cores, 2 x slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Plug-ins of pydantic watch validation; to look for them, it reads the metadata of every installed package.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        app()
    except UserError as error:
        _fail(error)
    except UnicodeEncodeError as error:
        if sys.getfilesystemencoding() == "utf-8":
            raise
        what = ascii(error.object[max(0, error.start - 20) : error.end + 20])
        _fail(UserError(f"this locale cannot express {what}: set LC_ALL=C.UTF-8, or PYTHONUTF8=1"))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        console.print(__version__, markup=False)
        raise typer.Exit


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The workspace to make, or to complete.", show_default=False)],
) -> None:
    """Make a workspace: copy the catalogue (recipes, tasks, fleets, mixtures, suites) into FOLDER; nothing is
    overwritten.
    """
    from mmopd import catalog

    for path in catalog.init(folder):
        console.print(f"  {path}", markup=False)
    console.print(f"Workspace ready. Next: cd {folder} && mmopd demo", markup=False)


@app.command()
def demo(overrides: Overrides = None, run: RunOption = None) -> None:
    """Run the whole job in minutes on this machine: `mmopd train recipes/demo.yaml`, a tiny student with real parts."""
    train(Path("recipes/demo.yaml"), overrides, run)


@app.command()
def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="A recipe file, such as recipes/demo.yaml.", show_default=False, autocompletion=complete("recipes")
        ),
    ] = None,
    overrides: Overrides = None,
    run: RunOption = None,
    *,
    resume: Annotated[
        Path | None, typer.Option(help="Continue this run folder from its last checkpoint.", show_default=False)
    ] = None,
    resume_or_start: Annotated[
        bool,
        typer.Option(
            "--resume-or-start", help="Continue the run of --run if it is there, else start it: for jobs that requeue."
        ),
    ] = False,
    endpoints: EndpointsOption = None,
    changed: Annotated[
        list[str] | None,
        typer.Option(
            "--changed-source", help="With --resume: a source that was added or removed on purpose.", show_default=False
        ),
    ] = None,
    changed_teachers: Annotated[
        list[str] | None,
        typer.Option(
            "--changed-teacher",
            help="With --resume: a teacher that is another one than before, on purpose.",
            show_default=False,
        ),
    ] = None,
    launcher: Annotated[
        str | None,
        typer.Option(
            help="A command that starts the ranks on several machines, such as 'deepspeed --hostfile hosts --module'.",
            show_default=False,
        ),
    ] = None,
    host: HostOption = "127.0.0.1",
    watch: Annotated[
        bool, typer.Option("--watch", help="Serve a live page of the run while it lasts, as `mmopd watch` does.")
    ] = False,
) -> None:
    """Prepare, serve, balance by difficulty, distil, evaluate and report: everything that RECIPE describes."""
    import shlex
    import shutil

    from mmopd.commands.open_run import open_run

    command = shlex.split(launcher or "")
    if command and shutil.which(command[0]) is None:
        raise UserError(f"--launcher: there is no command {command[0]!r}")
    folder, resolved = open_run(recipe, overrides or (), run, console, resume=resume, or_start=resume_or_start)
    from mmopd.commands.train import launch

    try:
        launch(
            folder,
            resolved,
            console,
            endpoints=endpoints or (),
            changed=changed or (),
            changed_teachers=changed_teachers or (),
            launcher=command,
            host=host,
            watch=watch,
        )
    except KeyboardInterrupt:
        console.print(
            f"interrupted; `mmopd train --resume {folder.root}` continues from the last checkpoint", markup=False
        )
        raise typer.Exit(130) from None
    except SystemExit as stop:
        _stopped(stop, f"stopped as requested; `mmopd train --resume {folder.root}` continues")


@app.command()
def serve(
    fleet: Annotated[
        Path,
        typer.Argument(
            help="A fleet file, such as teachers/demo.yaml.", show_default=False, autocompletion=complete("teachers")
        ),
    ],
    *,
    host: HostOption = "127.0.0.1",
    out: Annotated[Path, typer.Option(help="The file of endpoints to write, for `mmopd train --endpoints`.")] = Path(
        "endpoints.json"
    ),
    api_key_env: Annotated[
        str | None,
        typer.Option(help="The environment variable with the key; a new one is made if not given.", show_default=False),
    ] = None,
) -> None:
    """Serve the teachers of FLEET alone, for other jobs or machines, until Ctrl-C; a server that dies is restarted."""
    from mmopd import catalog
    from mmopd.commands.serve import serve as serve_fleet

    try:
        serve_fleet(catalog.load_fleet(fleet), host=host, out=out, key_variable=api_key_env, console=console)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C and stop signals are how it ends
        console.print("stopped")


@app.command("difficulty")
def measure_difficulty(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the picture, the weights and the logs. [default: difficulty/NAME]", show_default=False
        ),
    ] = None,
) -> None:
    """Let the untrained student answer every prompt of RECIPE several times, and show how hard the prompts are.

    The counts are kept next to the shards: a stopped pass continues where it was, and `mmopd train` uses them.
    """
    from mmopd import catalog
    from mmopd.commands.difficulty import measure

    resolved = catalog.load_recipe(recipe, overrides=overrides or ())
    measure(resolved, out or Path("difficulty") / recipe.stem, console)


@app.command("eval")
def evaluate(
    suite: Annotated[
        Path,
        typer.Argument(
            help="A suite file, such as eval/demo.yaml.", show_default=False, autocompletion=complete("eval")
        ),
    ],
    models: Annotated[
        list[Path], typer.Argument(help="HF folders to serve and evaluate, one row each.", show_default=False)
    ],
    recipe: Annotated[Path, typer.Option(help="The recipe whose student engine settings are used.")] = Path(
        "recipes/demo.yaml"
    ),
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
    as_json: JsonOption = False,
) -> None:
    """Serve each of MODELS and run the benchmarks of SUITE on it; prints a table, writes results.{json,md,csv}."""
    from mmopd import catalog
    from mmopd.commands.evaluate import evaluate_models
    from mmopd.evaluate.candidates import check_results, print_results

    results = evaluate_models(suite, models, catalog.load_recipe(recipe), out, progress_console(as_json))
    if as_json:
        print_json(results.to_dict())
    else:
        print_results(results, console)
    check_results(results)


@app.command()
def compare(
    comparison: Annotated[
        Path,
        typer.Argument(
            help="A comparison, such as recipes/compare_demo.yaml.",
            show_default=False,
            autocompletion=complete("recipes"),
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the runs, the tables and the plots.")] = Path("compare"),
) -> None:
    """Run a grid of variants and seeds, one after the other, and write tables with intervals.

    Finished runs are not repeated. Servers stay up while the next run needs the same models with the same settings.
    """
    from mmopd import catalog
    from mmopd.commands.compare import compare as run_grid
    from mmopd.runtime.progress import Stages

    try:
        with Stages(console) as stages:
            page = run_grid(comparison.stem, catalog.load_comparison(comparison), out, stages)
    except KeyboardInterrupt:
        console.print("stopped; the same command continues from the last checkpoint of its run")
        raise typer.Exit(130) from None
    except SystemExit as stop:
        console.print("stopped; the same command continues from the last checkpoint of its run")
        _stopped(stop)
    console.print(page.read_text(encoding="utf-8"), markup=False, soft_wrap=True)
    console.print(f"The tables: {page}", highlight=False, markup=False)


for command in (
    new,
    files.merge,
    files.prepare,
    files.index,
    inspect,
    files.report,
    files.watch,
    files.export,
    files.replay,
):
    app.command()(command)


@app.command()
def show(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="A recipe, a mixture such as data/demo.yaml, or another file of the catalogue.",
            show_default=False,
            autocompletion=complete("recipes", "data", "teachers", "eval"),
        ),
    ] = None,
    overrides: Overrides = None,
    *,
    key: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="KEY",
            help="Print what a setting means, such as train.lr or delta, instead.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(
            min=1, help="For a mixture: show the epochs of each source in this many prompts.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the resolved RECIPE with every default, and what it would start; or print what is in a mixture.

    A fleet, a suite, a comparison, a task (modalities/NAME.py) and an objective (algorithm/NAME.py) are checked, and
    printed with every default.

    With --explain, print what a setting of any file of the catalogue means, its type, range and default.
    """
    if key is not None:
        from mmopd.commands import reference

        if as_json:
            print_json([one.to_dict() for one in reference.find(key)])
        else:
            reference.explain(key, console)
        return
    if recipe is None:
        raise UserError("give a recipe (mmopd show recipes/demo.yaml), a mixture, or --explain KEY")
    from mmopd.commands.show_file import show_file

    show_file(recipe, overrides or (), prompts, as_json=as_json)


app.command()(machines.plan)
app.command()(machines.doctor)


def _stopped(stop: SystemExit, how: str = "") -> NoReturn:
    """End with STOPPED after a stop signal; `how` is said if training, which says it itself, was not under way."""
    if stop.code not in {STOPPED, *(128 + number for number in STOPS)}:
        raise stop
    if stop.code != STOPPED and how:
        console.print(how, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(STOPPED) from None


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _fail(error: UserError) -> None:
    message = Text.assemble(("error:", "bold red"), f" {error}")
    Console(stderr=True, emoji=False, highlight=False).print(message, soft_wrap=True)
    sys.exit(error.exit_status)
