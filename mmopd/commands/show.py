"""`mmopd show`: print the recipe with all defaults, and the processes that it would start."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mmopd import catalog, settings_file
from mmopd.config import Fleet, Mixture, Recipe
from mmopd.errors import ConfigError
from mmopd.report.loggers.start import check_installed
from mmopd.task.base import Task
from mmopd.task.load import load_tasks
from mmopd.teacher.router import RoutedTeacher, find_teachers, load_teachers, references

KEY = r"(?m)^[ -]*[^\s:]+(?=:)"  # of a line of YAML


def show(recipe: Recipe, console: Console) -> None:
    """Print the resolved recipe, then its processes and sources, then the teachers of each task.

    Raises:
        UserError: a file that the recipe names is missing or wrong, a prompt has no teacher or no view, or a logger is
            not installed.
    """
    check_installed(recipe.loggers)
    settings = Text(settings_file.dump(recipe).rstrip())
    settings.highlight_regex(KEY, "bold cyan")
    console.print(settings, soft_wrap=True)
    fleet = load_teachers(recipe.fleet, recipe.algorithm.objective)
    mixture = catalog.load_mixture(recipe.mixture, key="mixture")
    table = Table(title="What it would start", title_justify="left")
    for column in ("process", "model", "gets"):
        table.add_column(column)
    for row in _starts(recipe, fleet, mixture):
        table.add_row(*map(escape, row))
    console.print(table)
    if fleet.routes:
        console.print(teachers_table(fleet, mixture))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return what `show` prints, as JSON types.

    Raises:
        UserError: as for `show`.
    """
    fleet = load_teachers(recipe.fleet, recipe.algorithm.objective)
    mixture = catalog.load_mixture(recipe.mixture, key="mixture")
    starts = [dict(zip(("process", "model", "gets"), row, strict=True)) for row in _starts(recipe, fleet, mixture)]
    teachers = [
        {
            "task": task.name,
            "modality": task.modality,
            "teacher": teacher.name,
            "share": teacher.share,
            "weight": teacher.weight,
            "view": teacher.view.model_dump(mode="json"),
        }
        for task, routed in _scorers(fleet, mixture)
        for teacher in routed
    ]
    return {"recipe": recipe.model_dump(mode="json"), "starts": starts, "teachers": teachers}


def teachers_table(fleet: Fleet, mixture: Mixture) -> Table:
    """Return a table of the teachers of each task of the mixture, with their shares and views.

    Raises:
        ConfigError: an unknown task, or one whose prompts have no teacher or no view.
    """
    table = Table(title="Who scores what", title_justify="left")
    for column in ("prompts", "teacher", "of the target", "w_k", "is shown"):
        table.add_column(column)
    for task, teachers in _scorers(fleet, mixture):
        for i, teacher in enumerate(teachers):
            prompts = "" if i else f"{task.name} ({task.modality})"
            row = (prompts, teacher.name, f"{teacher.share:.0%}", f"{teacher.weight:g}", _shown(teacher))
            table.add_row(*map(escape, row))
    return table


def _starts(recipe: Recipe, fleet: Fleet, mixture: Mixture) -> Iterator[tuple[str, str, str]]:
    """Yield each process and source: its name, its model or folder, and what it gets."""
    reference = references(fleet, recipe.algorithm.objective)
    student = str(recipe.student.model)
    rollout = recipe.rollout
    train = recipe.train
    yield "student engine", student, f"{rollout.prompts} prompts x {rollout.group} responses a step"
    for name, teacher in fleet.teachers.items():
        routes = ", ".join(f"{r.task}/{r.modality}" for r in fleet.routes if name in r.teachers)
        where = f"{teacher.model} x {teacher.replicas}" if teacher.model else ", ".join(teacher.endpoints)
        as_reference = (
            "responses, as a reference" if reference and name in reference.teachers else "not started: no route"
        )
        yield f"teacher {name}", where, f"responses to {routes}" if routes else as_reference
    yield f"{train.ranks} training ranks", student, f"{train.steps} steps, ZeRO-3, {train.dtype}"
    total = sum(source.weight for source in mixture.sources.values())
    for name, source in mixture.sources.items():
        yield f"source {name}", str(source.shards), f"{source.weight / total:.0%} of the prompts, task {source.task}"


def _scorers(fleet: Fleet, mixture: Mixture) -> Iterator[tuple[Task, Sequence[RoutedTeacher]]]:
    """Yield each task of the mixture with its teachers; none if the fleet has no routes, as for an objective without
    teachers.
    """
    if not fleet.routes:
        return
    tasks = load_tasks()
    for name in dict.fromkeys(source.task for source in mixture.sources.values()):
        if name not in tasks:
            raise ConfigError(f"no task {name!r} in modalities/{settings_file.suggest(name, tasks)}")
        yield tasks[name], find_teachers(fleet, tasks, name, tasks[name].modality)


def _shown(teacher: RoutedTeacher) -> str:
    """Return the keys of the teacher's view that are set."""
    keys = teacher.view.model_dump(exclude_defaults=True)
    return (
        ", ".join(f"{key}: {value if key == 'images' else repr(value)}" for key, value in keys.items()) or "all of it"
    )
