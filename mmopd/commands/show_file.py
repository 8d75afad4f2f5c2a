"""`mmopd show FILE`: a recipe, a mixture, a fleet, a suite, a comparison, a task, or an objective."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.text import Text

from mmopd import catalog, settings_file
from mmopd.algorithm.objectives import FOLDER, find_objective
from mmopd.commands import show
from mmopd.commands.options import console, print_json
from mmopd.config import Comparison, Fleet, Suite, View
from mmopd.errors import ConfigError, UserError
from mmopd.settings_file import File
from mmopd.task.base import Task
from mmopd.teacher.view import ViewError, check_view

KINDS: tuple[type[File], ...] = (Fleet, Suite, Comparison)


def show_file(name: Path, overrides: Sequence[str], prompts: int | None, *, as_json: bool) -> None:
    """Print what a file of the catalogue says, with every default.

    Args:
        name: the file.
        overrides: key=value, for a recipe.
        prompts: for a mixture, the number of prompts drawn.
        as_json: print JSON.

    Raises:
        UserError: the file cannot be read or does not do what its kind needs, or takes no `overrides` or `prompts`.
    """
    path = catalog.find(name)
    said = _other_kind(name, path)
    if said is not None:
        if overrides or prompts is not None:
            raise UserError(f"{name}: this is {said['is']}; key=value is for a recipe, and --prompts for a mixture")
        if as_json:
            print_json(said)
        else:
            _print(said)
    elif catalog.is_mixture(path):
        _show_mixture(name, overrides, prompts, as_json=as_json)
    else:
        if prompts is not None:
            raise UserError(f"{name}: this is no mixture; --prompts is for a mixture, such as data/demo.yaml")
        recipe = catalog.load_recipe(name, overrides=overrides)
        if as_json:
            print_json(show.to_dict(recipe))
        else:
            show.show(recipe, console)


def _show_mixture(name: Path, overrides: Sequence[str], prompts: int | None, *, as_json: bool) -> None:
    if overrides:
        raise UserError(f"{name}: this is a mixture, which takes no key=value: change the file")
    from mmopd.prompts.mixture_view import mixture_tree, to_dict

    mixture = catalog.load_mixture(name)
    if as_json:
        print_json(to_dict(mixture, prompts))
    else:
        console.print(mixture_tree(mixture, str(name), prompts))


def _other_kind(name: Path, path: Path) -> dict[str, Any] | None:
    """Return what a file is, what takes it, and its settings; None for a recipe, a mixture, and an unknown file."""
    if path.suffix == ".py":
        return _of_python(path)
    keys = settings_file.keys_of(path).keys()
    for cls in KINDS:
        if cls.required() & keys:
            settings = settings_file.read(cls, path)
            if isinstance(settings, Fleet):
                _check_views(path, settings.views)
            shown = settings.model_dump(mode="json")
            return {"file": str(name), "is": cls.what, "use": cls.use.format(path=name), "settings": shown}
    return None


def _print(said: dict[str, Any]) -> None:
    console.print(f"{said['file']}: {said['is']}; {said['use']}", markup=False, soft_wrap=True)
    text = Text(yaml.safe_dump(said["settings"], sort_keys=False, allow_unicode=True, width=120).rstrip())
    text.highlight_regex(show.KEY, "bold cyan")
    console.print(text, soft_wrap=True)


def _of_python(path: Path) -> dict[str, Any]:
    """Return what the file of a task or of an objective says."""
    where = path.absolute().parent
    if where.name == "modalities":
        task = getattr(catalog.load_module(path), "task", None)
        if not isinstance(task, Task):
            raise ConfigError(f"{path}: it defines no `task = Task(name=..., modality=..., verify=...)`")
        use = "sources of a mixture name it under `task`"
        return {"file": str(path), "is": f"the task {task.name}", "use": use, "settings": _of_task(path, task)}
    if where == Path.cwd() / FOLDER:
        try:
            objective = find_objective(path.stem)
        except ValueError as error:  # a file name that no recipe can name
            raise ConfigError(f"{path}: {error}") from None
        settings = {
            key: "required" if field.is_required() else field.get_default(call_default_factory=True)
            for key, field in objective.model_fields.items()
        }
        use = f"a recipe names it: `algorithm.objective: {{kind: {path.stem}}}`"
        return {"file": str(path), "is": f"the objective {objective.__name__}", "use": use,
                "settings": settings | {"kind": path.stem}}  # fmt: skip
    raise ConfigError(
        f"{path}: mmopd show takes Python files of modalities/ (a task) and of {FOLDER}/ in the current folder (an "
        "objective); `mmopd prepare` takes converters of data/"
    )


def _of_task(path: Path, task: Task) -> dict[str, Any]:
    """Return the fields of a task, with the messages that it makes of a question."""
    items = 0 if task.modality == "text" else 1
    try:
        messages = [dict(message) for message in task.messages("QUESTION", items)]
    except Exception as error:  # the function is the user's
        raise ConfigError(f"{path}: `messages` of the task raises {type(error).__name__}: {error}") from error
    _check_views(path, task.views)
    return {
        "name": task.name,
        "modality": task.modality,
        "verify": f"{task.verify.__module__.removeprefix('mmopd_catalog_')}.{task.verify.__qualname__}",
        "timeout": task.timeout,
        "views": {name: view.model_dump(mode="json") for name, view in task.views.items()},
        "messages": messages,
    }


def _check_views(path: Path, views: Mapping[str, View]) -> None:
    for name, view in views.items():
        try:
            check_view(view)
        except ViewError as error:
            raise ConfigError(f"{path}: view {name!r}: {error}") from None
