"""The commands about machines: plan and doctor."""

from pathlib import Path
from typing import Annotated

import typer

from mmopd.commands.options import (
    EndpointsOption,
    JsonOption,
    Overrides,
    RecipeArgument,
    complete,
    console,
    print_json,
    progress_console,
)


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
    as_json: JsonOption = False,
) -> None:
    """Estimate whether RECIPE fits given GPUs, and how long a step takes; exit status 1 if it does not fit.

    The config.json of each model is enough. Memory and time are arithmetic from published numbers and stated
    assumptions: **nothing has been measured on a GPU.**
    """
    from mmopd import catalog
    from mmopd.capacity.budget import Machines, budget
    from mmopd.capacity.memory import find_gpu
    from mmopd.capacity.show import show_budget, to_dict

    machines = Machines(find_gpu(gpu, gpu_memory, tflops, bandwidth), gpus, nodes)
    found = budget(
        catalog.load_recipe(recipe, overrides=overrides or ()), machines, response=response, elsewhere=elsewhere
    )
    if as_json:
        print_json(to_dict(found))
    else:
        show_budget(found, console)
    if found.refusals:
        raise typer.Exit(1)


def doctor(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="A recipe whose teachers are examined, too.", show_default=False, autocompletion=complete("recipes")
        ),
    ] = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the findings and the logs. [default: doctor/NAME]", show_default=False),
    ] = None,
    endpoints: EndpointsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Report what this machine can do and what is missing; exit status 1 if something needed is missing.

    With RECIPE, serve its student and teachers as `mmopd train` does, and examine every teacher: it must have the
    student's vocabulary, room for the longest response, scores that repeat, and it must see the images that it is sent.
    """
    from mmopd import catalog
    from mmopd.commands.doctor import machine_report
    from mmopd.preflight.check import render, to_dict

    resolved = catalog.load_recipe(recipe, overrides=overrides or ()) if recipe is not None else None
    report = progress_console(as_json)
    checks = machine_report()
    render(checks, report)
    if recipe is not None and resolved is not None:
        from mmopd.commands.examine import examine
        from mmopd.preflight.run import show

        found = examine(resolved, out or Path("doctor") / recipe.stem, report, endpoints or ())
        show(found, report)
        checks += found
    if as_json:
        print_json(to_dict(checks))
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)
