"""`mmopd show`: the recipe with every default, and what it would start."""

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from mmopd import catalog, config
from mmopd.config import Recipe


def show(recipe: Recipe, console: Console) -> None:
    """Print the resolved recipe, then its processes and sources.

    Raises:
        UserError: a file that the recipe names is missing or wrong.
    """
    console.print(Syntax(config.dump(recipe), "yaml", background_color="default"))
    fleet, mixture = catalog.load_fleet(recipe.fleet), catalog.load_mixture(recipe.mixture)
    rollout, train = recipe.rollout, recipe.train
    table = Table(title="What it would start", title_justify="left")
    for column in ("process", "model", "gets"):
        table.add_column(column)
    table.add_row("student engine", str(recipe.student.model), f"{rollout.prompts} prompts x {rollout.group} responses a step")
    for name, teacher in fleet.teachers.items():
        routes = ", ".join(f"{r.task}/{r.modality}" for r in fleet.routes if r.teacher == name)
        where = f"{teacher.model} x {teacher.replicas}" if teacher.model else ", ".join(teacher.endpoints)
        table.add_row(f"teacher {name}", where, f"responses to {routes}" if routes else "nothing: no route")
    table.add_row(f"{train.ranks} training ranks", str(recipe.student.model), f"{train.steps} steps, ZeRO-3, {train.dtype}")
    total = sum(source.weight for source in mixture.sources.values())
    for name, source in mixture.sources.items():
        table.add_row(f"source {name}", str(source.shards), f"{source.weight / total:.0%} of the prompts, task {source.task}")
    console.print(table)
