"""Open the run of `mmopd train`: a new folder, or one that goes on."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from mmopd import catalog
from mmopd.config import Recipe
from mmopd.errors import UserError
from mmopd.runtime.run_folder import RunFolder


def open_run(
    recipe: Path | None,
    overrides: Sequence[str],
    run: Path | None,
    console: Console,
    *,
    resume: Path | None,
    or_start: bool,
) -> tuple[RunFolder, Recipe]:
    """Return the run folder and its settings; a new folder is created.

    Args:
        recipe: a recipe file, or None with `resume`.
        overrides: key=value of the recipe.
        run: the folder; named by the recipe and the time if not given.
        console: where it is said that a run that goes on has other settings than the recipe.
        resume: folder of a run that goes on.
        or_start: go on with `run` if it is there.

    Raises:
        UserError: arguments that do not go together, a folder that exists, or a recipe that cannot be read.
    """
    if recipe is not None and resume is not None:
        raise UserError(f"--resume takes no recipe and no key=value: change its settings in {resume}/recipe.yaml")
    if or_start and (recipe is None or run is None):
        raise UserError("--resume-or-start needs a recipe and --run: it starts the run there, or goes on with it")
    if resume is not None:
        return RunFolder(resume), RunFolder(resume).recipe()
    if recipe is None:
        raise UserError("give a recipe (mmopd train recipes/demo.yaml), or --resume with a run folder")
    resolved = catalog.load_recipe(recipe, overrides=overrides)
    folder = RunFolder(run or Path("runs") / f"{recipe.stem}-{datetime.now():%Y%m%d-%H%M%S}")
    if not (or_start and folder.recipe_file.is_file()):
        folder.create(resolved)
        return folder, resolved
    own = folder.recipe()
    if keys := list(_differing(own.model_dump(mode="json"), resolved.model_dump(mode="json"))):
        said = f"{folder.root} goes on with its own recipe.yaml, which differs from {recipe} in {', '.join(keys)}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    return folder, own


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the keys, with dots, whose values differ."""
    found = []
    for key in a.keys() | b.keys():
        ours, theirs = a.get(key), b.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += [f"{key}.{below}" for below in _differing(ours, theirs)]
        elif ours != theirs:
            found.append(key)
    return sorted(found)
