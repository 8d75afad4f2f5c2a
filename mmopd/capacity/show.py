"""`mmopd plan`: print a table for each role, one for the GPUs, one for a step, and a verdict."""

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmopd.capacity.budget import Budget, Role
from mmopd.capacity.memory import GIB
from mmopd.capacity.step_time import ALL_REDUCE, DECODE, HOST, PEER, PREFILL, UPDATE

WIDTH = 96  # width of a table, which fits a terminal of 100 columns


def show_budget(budget: Budget, console: Console) -> None:
    """Print the estimate; what does not fit is printed last."""
    gpu = budget.machines.gpu
    for role in budget.roles:
        console.print(_role(role))
    console.print(_gpus(budget))
    console.print(_step(budget))
    assumed = (
        f"Assumed: decoding reaches {DECODE:.0%} of {gpu.bandwidth:,g} GB/s, scoring {PREFILL:.0%} and the update "
        f"{UPDATE:.0%} of {gpu.tflops:,g} TFLOP/s; weights move at {HOST / 1e9:g} GB/s to and from the machine's "
        f"memory, and at {PEER / 1e9:g} from GPU to GPU; an all-reduce takes {1e6 * ALL_REDUCE:g} us; prompts have "
        "half the tokens of the longest; flash-attn is installed (without it the attention mask of a row needs more "
        "memory)."
    )
    console.print(f"[dim]Estimates by arithmetic: nothing here has been measured on a GPU. {assumed}[/]", width=WIDTH)
    if budget.refusals:
        console.print("[bold red]Does not fit:[/]")
        for refusal in budget.refusals:
            console.print(f"- {escape(refusal)}", width=WIDTH)
    else:
        console.print(
            f"[bold green]Fits[/] {budget.machines.nodes} x {budget.machines.gpus} {gpu.name}, by this estimate."
        )


def to_dict(budget: Budget) -> dict[str, Any]:
    """Return the estimate as JSON types, with memory in GiB."""
    machines = budget.machines
    roles = [
        {
            "role": role.title,
            "gpus": role.where,
            "peak_gib": role.peak / GIB,
            "memory": [{"what": part.what, "gib": part.size / GIB, "how": part.how} for part in role.parts],
        }
        for role in budget.roles
    ]
    return {
        "fits": not budget.refusals,
        "refusals": budget.refusals,
        "gpu": machines.gpu.name,
        "gpu_memory_gib": machines.gpu.memory,
        "gpus": machines.gpus,
        "nodes": machines.nodes,
        "roles": roles,
        "elsewhere": budget.elsewhere,
        "times": [time._asdict() for time in budget.times],
        "step_seconds": budget.step,
        "steps": budget.steps,
    }


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", width=WIDTH)
    for column, width in zip(columns, (22, 8, None), strict=True):
        table.add_column(
            column,
            justify="right" if column in {"GiB", "seconds"} else "left",
            min_width=width,
            max_width=width,
            ratio=None if width else 1,
        )
    return table


def _role(role: Role) -> Table:
    table = _table(escape(role.title), "memory", "GiB", "")
    for part in role.parts:
        table.add_row(escape(part.what), f"{part.size / GIB:.2f}", escape(part.how))
    table.add_section()
    table.add_row("peak", f"{role.peak / GIB:.2f}", "")
    return table


def _gpus(budget: Budget) -> Table:
    """Return the table of GPUs; neighbours with the same processes share a row."""
    machines = budget.machines
    table = _table(f"GPUs, {machines.gpu.memory:g} GiB each", "GPU", "GiB", "what runs there")
    names = [role.title.partition(",")[0] for role in budget.roles]
    places = [(node, gpu) for node in range(machines.nodes) for gpu in range(machines.gpus)]
    there = {place: [i for i, role in enumerate(budget.roles) if place in role.where] for place in places}
    for (node, roles), group in groupby(places, key=lambda place: (place[0], there[place])):
        numbers = [gpu for _, gpu in group]
        span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        needs = sum(budget.roles[i].peak for i in roles) / GIB
        table.add_row(f"node {node}: {span}", f"{needs:.1f}", escape(", ".join(names[i] for i in roles) or "nothing"))
    for name in budget.elsewhere:
        table.add_row("elsewhere", "", f"Teacher {escape(name)}")
    return table


def _step(budget: Budget) -> Table:
    table = _table("A step", "part", "seconds", "")
    for time in budget.times:
        table.add_row(escape(time.what), f"{time.seconds:,.0f}", escape(time.how))
    table.add_section()
    table.add_row(
        "a step", f"{budget.step:,.0f}", f"{budget.steps:,} steps take {budget.steps * budget.step / 3600:,.0f} h"
    )
    return table
