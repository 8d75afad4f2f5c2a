"""`mmopd inspect`: rows of shards and recorded responses, with their images."""

from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmopd.commands.options import JsonOption, complete, console, print_json
from mmopd.errors import UserError

if TYPE_CHECKING:
    from mmopd.config import Recipe
    from mmopd.prompts.shards import Shards
    from mmopd.report.inspection.found import Filters, Found
    from mmopd.report.inspection.rows import Readers, Teachers

MOST = 200  # rows that are shown


class Hardness(StrEnum):
    """How often the untrained student answers a row rightly."""

    NEVER = "never"
    SOMETIMES = "sometimes"
    ALWAYS = "always"
    UNJUDGED = "unjudged"


class Verdict(StrEnum):
    """Outcome of a response."""

    RIGHT = "right"
    WRONG = "wrong"
    PARTLY = "partly"
    UNKNOWN = "unknown"


def inspect(
    what: Annotated[
        Path,
        typer.Argument(
            help="A folder of shards, one tar or index of it, a mixture such as data/demo.yaml, a run folder, or a "
            "samples.jsonl.",
            show_default=False,
            autocompletion=complete("data"),
        ),
    ],
    *,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Show each prompt exactly as the student and each teacher of this recipe read it.",
            show_default=False,
            autocompletion=complete("recipes"),
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, max=MOST, help="Number of rows or responses to show.")] = 5,
    row: Annotated[
        list[str] | None,
        typer.Option(help="Only this row, such as digit_sum/17; may be repeated.", show_default=False),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Only rows of this source.", show_default=False)] = None,
    difficulty: Annotated[
        Hardness | None,
        typer.Option(help="Only rows that the untrained student answers rightly so often.", show_default=False),
    ] = None,
    outcome: Annotated[
        Verdict | None, typer.Option(help="Only responses with this outcome.", show_default=False)
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Only what this teacher scores; for shards, --recipe has the routes.", show_default=False),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="Write one self-contained HTML file instead of printing.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look at rows of shards, or at recorded responses of a run, with their images.

    For responses, the tokens on which student and teacher differ most are listed. Rows that cannot be read are named.

    - `mmopd inspect shards/mine`: the first rows of a folder, and what `mmopd difficulty` found about them
    - `mmopd inspect data/demo.yaml --difficulty never --source digit_sum`: rows that are too hard
    - `mmopd inspect data/demo.yaml --row digit_sum/17 --recipe recipes/demo.yaml`: a row as each model reads it
    - `mmopd inspect runs/demo --outcome wrong --page wrong.html`: wrong responses, as a page
    - `mmopd inspect runs/demo/samples.jsonl --teacher image_teacher --json`: for a script
    """
    from mmopd.report.inspection.found import Filters

    if page is not None and as_json:
        raise UserError("--page writes a page and --json prints JSON: choose one of them")
    filters = Filters(source, difficulty and difficulty.value, outcome and outcome.value, teacher, tuple(row or ()))
    found = _find(what, recipe, filters, max(rows, len(filters.keys)))
    if as_json:
        from mmopd.report.inspection.terminal import to_dict

        print_json(to_dict(found))
    elif page is not None:
        from mmopd.report.inspection.page import write_page

        write_page(found, page)
        shown = f"{len(found.entries):,} of {found.matching:,} that match"
        console.print(f"page: {page} ({shown})", markup=False, highlight=False, soft_wrap=True)
    else:
        from mmopd.report.inspection.terminal import show

        show(found, console)


def _find(what: Path, recipe: Path | None, filters: "Filters", rows: int) -> "Found":
    """Open what is inspected, and choose from it."""
    from mmopd import catalog
    from mmopd.prompts.shards import open_mixture
    from mmopd.report.inspection.responses import find_responses
    from mmopd.report.inspection.rows import find_rows
    from mmopd.runtime.run_folder import RunFolder
    from mmopd.task.load import load_tasks

    resolved = catalog.load_recipe(recipe) if recipe is not None else None
    if (samples := _samples(what)) is not None:

        def sources() -> "Mapping[str, Shards]":
            used = resolved or RunFolder(samples.parent).recipe()
            return open_mixture(catalog.load_mixture(used.mixture), load_tasks(), Path.cwd())

        return find_responses(str(what), samples, filters, rows, open_sources=sources, readers=_readers(resolved))
    opened, within = _shards(what)
    teachers = _teachers(resolved) if filters.teacher is not None else None
    return find_rows(str(what), opened, filters, rows, within=within, teachers=teachers, readers=_readers(resolved))


def _samples(what: Path) -> Path | None:
    """Return the file of responses of a run folder, or the file itself; None for shards and mixtures."""
    from mmopd.runtime.run_folder import RunFolder

    if what.suffix == ".jsonl":
        if not what.is_file():
            raise UserError(f"{what}: no such file")
        return what
    run = RunFolder(what)
    return run.samples if any(p.is_file() for p in (run.recipe_file, run.metrics, run.samples)) else None


def _shards(what: Path) -> tuple["Mapping[str, Shards]", range | None]:
    """Open a folder of shards, one of its files, or the sources of a mixture; return them and the rows of one file."""
    from mmopd import catalog
    from mmopd.prompts.index import SUFFIX
    from mmopd.prompts.shards import Shards, open_mixture
    from mmopd.task.load import load_tasks

    if what.suffix in (".yaml", ".yml"):
        return open_mixture(catalog.load_mixture(what), load_tasks(), Path.cwd()), None
    if not what.exists():
        raise UserError(f"{what}: no such file or folder{_takes()}")
    if what.name.endswith((".tar", SUFFIX)):
        shards = Shards(what.absolute().parent)
        return {shards.name: shards}, shards.rows_in(what.name.removesuffix(".tar").removesuffix(SUFFIX) + ".tar")
    if not any(file.name.endswith((".tar", SUFFIX)) for file in what.glob("*")):
        raise UserError(f"{what}: nothing here that can be inspected{_takes()}")
    shards = Shards(what)
    return {shards.name: shards}, None


def _takes() -> str:
    return "; give a folder of shards, a mixture (data/NAME.yaml), a run folder, or a samples.jsonl"


def _readers(recipe: "Recipe | None") -> "Readers | None":
    if recipe is None:
        return None
    from mmopd.report.inspection.seen import ModelViews  # loads torch and transformers

    return ModelViews(recipe)


def _teachers(recipe: "Recipe | None") -> "Teachers | None":
    """Return a function from task and modality to the names of their teachers."""
    if recipe is None:
        return None
    from mmopd.task.load import load_tasks
    from mmopd.teacher.router import find_teachers, load_teachers

    fleet = load_teachers(recipe.fleet, recipe.algorithm.objective)
    tasks = load_tasks()

    def names(task: str, modality: str) -> Collection[str]:
        return [teacher.name for teacher in find_teachers(fleet, tasks, task, modality)] if fleet.routes else []

    return names
