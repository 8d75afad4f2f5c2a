"""Routes: the teachers of a prompt and their views; all checks run before training starts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mmopd import catalog
from mmopd.algorithm.base import Objective
from mmopd.config import Fleet, Route, View
from mmopd.errors import ConfigError
from mmopd.model_folder import load_tokenizer
from mmopd.settings_file import suggest
from mmopd.task.base import Task
from mmopd.teacher.view import BUILT_IN, ViewError, check_view


@dataclass(frozen=True, slots=True)
class RoutedTeacher:
    """A teacher of a prompt and its view of the prompt."""

    name: str  # name in the fleet
    share: float  # share of its log-probs in the target; the shares of a prompt's teachers sum to 1
    weight: float  # w_k of Eq. 4
    view: View


def find_route(fleet: Fleet, task: str, modality: str) -> Route:
    """Return the first route that matches.

    Raises:
        ConfigError: no route matches.
    """
    for route in fleet.routes:
        if fnmatchcase(task, route.task) and fnmatchcase(modality, route.modality):
            return route
    routes = (
        "".join(f"\n  - {{task: {r.task!r}, modality: {r.modality!r}, teacher: {r.teacher}}}" for r in fleet.routes)
        or " none"
    )
    raise ConfigError(
        f"no route for prompts of task {task!r} and modality {modality!r}; add one to the fleet's routes, which "
        f"are:{routes}"
    )


def find_view(fleet: Fleet, tasks: Mapping[str, Task], task: str, name: str) -> View:
    """Return the view with this name: the fleet's, else the task's, else the built-in one.

    Raises:
        ConfigError: there is no such view; the message names the task and suggests a known name.
    """
    layers = (fleet.views, tasks[task].views if task in tasks else {}, BUILT_IN)
    for views in layers:
        if name in views:
            return views[name]
    known = [known for views in layers for known in views]
    raise ConfigError(
        f"no view {name!r} for prompts of task {task!r}, neither in the fleet nor in the task nor built in"
        f"{suggest(name, known)}"
    )


def find_teachers(fleet: Fleet, tasks: Mapping[str, Task], task: str, modality: str) -> tuple[RoutedTeacher, ...]:
    """Return the teachers for these prompts in the order of their route, each with the route's view or else its own.

    Raises:
        ConfigError: no route matches, or a view does not exist.
    """
    route = find_route(fleet, task, modality)
    return tuple(
        RoutedTeacher(
            name,
            share,
            fleet.teachers[name].weight,
            find_view(fleet, tasks, task, route.view or fleet.teachers[name].view),
        )
        for name, share in route.teachers.items()
    )


def load_teachers(fleet: Path | None, objective: Objective) -> Fleet:
    """Read the fleet of a run; it is empty if the objective learns only from outcomes.

    Raises:
        ConfigError: the file is missing or wrong.
    """
    if fleet is None or not objective.needs_teachers:
        return Fleet(teachers={}, routes=())
    return catalog.load_fleet(fleet, key="fleet")


def routed(fleet: Fleet) -> Fleet:
    """Return the fleet without the teachers that no route leads to."""
    used = {name for route in fleet.routes for name in route.teachers}
    return fleet.model_copy(
        update={"teachers": {name: teacher for name, teacher in fleet.teachers.items() if name in used}}
    )


def references(fleet: Fleet, objective: Objective) -> Fleet | None:
    """Return the fleet whose routes lead to the teachers' references; None if the objective has no reference.

    Raises:
        ConfigError: a teacher has no reference, or the fleet has no teacher with the reference's name.
    """
    key = "algorithm.objective.reference"
    named = objective.references()
    if named is None:
        return None
    routes = []
    for route in fleet.routes:
        shares: dict[str, float] = {}
        for teacher, share in route.teachers.items():
            name = named if isinstance(named, str) else named.get(teacher)
            if name is None:
                raise ConfigError(f"{key}: teacher {teacher!r} has none; add `{teacher}: NAME`, a teacher of the fleet")
            if name not in fleet.teachers:
                raise ConfigError(f"{key}: the fleet has no teacher {name!r}{suggest(name, fleet.teachers)}")
            shares[name] = shares.get(name, 0.0) + share
        routes.append(route.model_copy(update={"teacher": shares}))
    return routed(fleet.model_copy(update={"routes": tuple(routes)}))


def check_routes(fleet: Fleet, tasks: Mapping[str, Task], pairs: Iterable[tuple[str, str]]) -> None:
    """Check that every (task, modality) of a mixture has its teachers, and that all views are well formed.

    The views are those of the fleet and of these tasks. The texts that a view shows are checked when a row is read.

    Raises:
        ConfigError: names the first pair or the first view that is wrong.
    """
    pairs = sorted(set(pairs))
    declared = {"the fleet": fleet.views} | {f"task {task!r}": tasks[task].views for task, _ in pairs if task in tasks}
    for owner, views in declared.items():
        for name, view in views.items():
            try:
                check_view(view)
            except ViewError as error:
                raise ConfigError(f"view {name!r} of {owner}: {error}") from None
    for task, modality in pairs:
        find_teachers(fleet, tasks, task, modality)


def check_tokenizers(student: Path, teachers: Mapping[str, Path]) -> None:
    """Check that every token of the student has the same id in each teacher.

    A teacher may know more tokens, and may have fewer padding rows. Scoring uses only ids: a teacher with other ids
    would score another text without any error.

    Raises:
        ConfigError: a token has another id; names the teacher and the first tokens that differ.
        CheckpointError: a folder has no tokenizer.
    """
    ours = _vocabulary(student)
    for name, folder in teachers.items():
        theirs = _vocabulary(folder)
        differing = [
            (token, i, theirs.get(token))
            for token, i in sorted(ours.items(), key=lambda item: item[1])
            if theirs.get(token) != i
        ]
        if differing:
            shown = ", ".join(
                f"{token!r} is {i} for the student and {'unknown' if their is None else their} for the teacher"
                for token, i, their in differing[:3]
            )
            raise ConfigError(
                f"teacher {name!r} ({folder}): {len(differing)} of {len(ours)} tokens differ from the student's "
                f"({student}): {shown}. "
                "A teacher must share the student's tokenizer: choose one of the same model family"
            )


def _vocabulary(folder: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = load_tokenizer(folder).get_vocab()
    return vocabulary
