"""Loads the tasks of the catalogue."""

import importlib
from pathlib import Path

from mmopd import catalog
from mmopd.errors import ConfigError
from mmopd.task.base import Task


def load_tasks(workspace: Path | None = None) -> dict[str, Task]:
    """Load every task of modalities/, by name; a file of the workspace replaces the shipped file of the same name.

    Raises:
        ConfigError: a file does not load or has no `task`, or two files have a task of the same name; names the files.
    """
    roots = (catalog.shipped(), workspace or Path.cwd())
    files = {path.name: path for root in roots for path in sorted((root / "modalities").glob("*.py"))}
    tasks: dict[str, Task] = {}
    origin: dict[str, Path] = {}
    for path in files.values():
        task = getattr(catalog.load_module(path), "task", None)
        if not isinstance(task, Task):
            raise ConfigError(f"{path}: it defines no `task = Task(name=..., modality=..., verify=...)`")
        if task.name in tasks:
            raise ConfigError(f"{path}: its task is named {task.name!r}, as is that of {origin[task.name]}; rename one")
        tasks[task.name] = task
        origin[task.name] = path
    return tasks


def tasks_of(module: str) -> dict[str, Task]:
    """Return the `TASKS` of an installed module, which are not of the catalogue."""
    return dict(importlib.import_module(module).TASKS)
