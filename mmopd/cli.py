"""The command line, one function for each command of `mmopd --help`. Heavy imports wait until a command needs them."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from mmopd import __version__
from mmopd.commands import files, terminal
from mmopd.commands.options import EndpointsOption, HostOption, Overrides, RecipeArgument, RunOption, console
from mmopd.errors import STOPPED, UserError
from mmopd.runtime import python
from mmopd.runtime.processes import STOPS

app = typer.Typer(
    help="Distil a Qwen-VL student from several teachers, on its own rollouts, over text and images.",
    no_args_is_help=True,
    add_completion=False,
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
        console.print(f"  {path}")
    console.print(f"Workspace ready. Next: cd {folder} && mmopd demo")


@app.command()
def demo(overrides: Overrides = None, run: RunOption = None) -> None:
    """Run the whole job in minutes on this machine: `mmopd train recipes/demo.yaml`, a tiny student with real parts."""
    train(Path("recipes/demo.yaml"), overrides, run)


@app.command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe file, such as recipes/demo.yaml.", show_default=False)
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
    launcher: Annotated[
        str | None,
        typer.Option(
            help="A command that starts the ranks on several machines, such as 'deepspeed --hostfile hosts --module'.",
            show_default=False,
        ),
    ] = None,
    host: HostOption = "127.0.0.1",
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
        launch(folder, resolved, console, endpoints=endpoints or (), changed=changed or (), launcher=command, host=host)
    except KeyboardInterrupt:
        console.print(f"interrupted; `mmopd train --resume {folder.root}` continues from the last checkpoint")
        raise typer.Exit(130) from None
    except SystemExit as stop:
        _stopped(stop, f"stopped as requested; `mmopd train --resume {folder.root}` continues")


@app.command()
def serve(
    fleet: Annotated[Path, typer.Argument(help="A fleet file, such as teachers/demo.yaml.", show_default=False)],
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
    suite: Annotated[Path, typer.Argument(help="A suite file, such as eval/demo.yaml.", show_default=False)],
    models: Annotated[
        list[Path], typer.Argument(help="HF folders to serve and evaluate, one row each.", show_default=False)
    ],
    recipe: Annotated[Path, typer.Option(help="The recipe whose student engine settings are used.")] = Path(
        "recipes/demo.yaml"
    ),
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
) -> None:
    """Serve each of MODELS and run SUITE on it through lmms-eval; prints a table, writes results.{json,md,csv}."""
    from mmopd import catalog
    from mmopd.commands.evaluate import evaluate_models

    evaluate_models(suite, models, catalog.load_recipe(recipe), out, console)


@app.command()
def compare(
    comparison: Annotated[
        Path, typer.Argument(help="A comparison, such as recipes/compare_demo.yaml.", show_default=False)
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


for command in (files.merge, files.prepare, files.index, files.report, files.export, files.replay):
    app.command()(command)


@app.command()
def show(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe, or a mixture such as data/demo.yaml.", show_default=False)
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
) -> None:
    """Print the resolved RECIPE with every default, and what it would start; or print what is in a mixture.

    With --explain, print what a setting of any file of the catalogue means, its type, range and default.
    """
    if key is not None:
        from mmopd.commands.reference import explain

        explain(key, console)
        return
    if recipe is None:
        raise UserError("give a recipe (mmopd show recipes/demo.yaml), a mixture, or --explain KEY")
    from mmopd import catalog

    if catalog.is_mixture(catalog.find(recipe)):
        from mmopd.prompts.mixture_view import mixture_tree

        console.print(mixture_tree(catalog.load_mixture(recipe), str(recipe), prompts))
    else:
        from mmopd.commands.show import show as print_recipe

        print_recipe(catalog.load_recipe(recipe, overrides=overrides or ()), console)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    *,
    gpu: Annotated[
        str, typer.Option(help="H200-141G, H100-80G, H20-96G, A100-80G, A100-40G or L40S-48G.")
    ] = "H100-80G",
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="For another GPU: usable memory in GiB.", show_default=False)
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=1, help="For another GPU: dense bfloat16 TFLOP/s.", show_default=False)
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(min=1, help="For another GPU: memory bandwidth in GB/s.", show_default=False)
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs per node.")] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes; the servers run on the first one.")] = 1,
    response: Annotated[
        int | None,
        typer.Option(
            min=1, help="Mean number of tokens of a response. [default: half of rollout.max_tokens]", show_default=False
        ),
    ] = None,
    elsewhere: Annotated[
        bool, typer.Option("--teachers-elsewhere", help="The teachers run on other machines, started by `mmopd serve`.")
    ] = False,
) -> None:
    """Estimate whether RECIPE fits given GPUs, and how long a step takes; exit status 1 if it does not fit.

    The config.json of each model is enough. Memory and time are arithmetic from published numbers and stated
    assumptions: **nothing has been measured on a GPU.**
    """
    from mmopd import catalog
    from mmopd.capacity.budget import Machines, budget
    from mmopd.capacity.memory import find_gpu
    from mmopd.capacity.show import show_budget

    machines = Machines(find_gpu(gpu, gpu_memory, tflops, bandwidth), gpus, nodes)
    found = budget(
        catalog.load_recipe(recipe, overrides=overrides or ()), machines, response=response, elsewhere=elsewhere
    )
    show_budget(found, console)
    if found.refusals:
        raise typer.Exit(1)


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe whose teachers are examined, too.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the findings and the logs. [default: doctor/NAME]", show_default=False),
    ] = None,
    endpoints: EndpointsOption = None,
) -> None:
    """Report what this machine can do and what is missing; exit status 1 if something needed is missing.

    With RECIPE, serve its student and teachers as `mmopd train` does, and examine every teacher: it must have the
    student's vocabulary, room for the longest response, scores that repeat, and it must see the images that it is sent.
    """
    from mmopd import catalog
    from mmopd.commands.doctor import machine_report
    from mmopd.preflight.check import render

    resolved = catalog.load_recipe(recipe, overrides=overrides or ()) if recipe is not None else None
    checks = machine_report()
    render(checks, console)
    if recipe is not None and resolved is not None:
        from mmopd.commands.examine import examine
        from mmopd.preflight.run import show

        found = examine(resolved, out or Path("doctor") / recipe.stem, console, endpoints or ())
        show(found, console)
        checks += found
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)


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
    Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
    sys.exit(error.exit_status)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
