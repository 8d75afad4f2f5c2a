"""`mmopd doctor RECIPE`: start the servers of a recipe and examine every teacher."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mmopd.commands.job import check, prepare, prove, serving
from mmopd.config import Recipe
from mmopd.preflight.check import Check
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.runtime.run_folder import RunFolder, make_private


def examine(recipe: Recipe, out: Path, console: Console, endpoints: Sequence[Path] = ()) -> list[Check]:
    """Run `mmopd doctor RECIPE`: prepare, start all servers of the recipe, and examine the teachers; nothing is
    trained.

    Args:
        recipe: the recipe.
        out: folder for logs and results.
        console: where the progress is shown.
        endpoints: same as in `launch`.

    Raises:
        UserError: same cases as `prepare`, `check`, `serving` and `prove`.
    """
    run = RunFolder(out)
    make_private(out)
    run.logs.mkdir(exist_ok=True)
    with Stages(console) as stages, Children() as children:
        prepare(recipe, stages)
        job = check(recipe, endpoints)
        with serving(job, run, children, stages) as servers:
            return prove(job, servers, run, stages)
