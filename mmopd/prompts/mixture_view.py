"""View of a mixture, printed by `mmopd show data/MIX.yaml`; reads indices only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.tree import Tree

from mmopd.config import Mixture
from mmopd.prompts.remote import is_remote
from mmopd.prompts.shards import Shards, Totals, check_tasks, open_mixture
from mmopd.task.load import load_tasks


def contents(totals: Totals) -> str:
    """Format rows, tokens and images in one line."""
    if totals.text is None or totals.visual is None:
        tokens = "tokens not counted"
    else:
        tokens = f"{totals.text + totals.visual:,} tokens ({totals.visual:,} of images)"
    return f"{totals.rows:,} rows, {tokens}, {totals.images:,} images"


def mixture_tree(mixture: Mixture, title: str, prompts: int | None) -> Tree:
    """Build a tree of the sources with their shares and their epochs.

    A source whose folder is not there yet is named as such.

    Args:
        prompts: number of prompts drawn; if not given, as many as draw no row of any source twice.

    Raises:
        ConfigError: a task is unknown.
        DataError: a source cannot be opened.
    """
    opened, shares, prompts, missing = _opened(mixture, prompts)
    tree = Tree(
        f"[bold]{escape(title)}[/]  {contents(_sum([shards.totals() for shards in opened.values()]))}; "
        f"in {prompts:,} prompts:"
    )
    for name, shards in opened.items():
        epochs = prompts * shares[name] / len(shards)
        branch = tree.add(
            f"[bold]{escape(name)}[/]  {shares[name]:.1%} of the prompts, {epochs:,.2f} epochs; "
            f"{contents(shards.totals())}"
        )
        branch.add(escape(f"{mixture.sources[name].shards}, {shards.bytes / 2**20:,.1f} MiB"))
        for (task, modality), rows in sorted(shards.kinds.items()):
            branch.add(escape(f"task {task} ({modality}): {rows:,} rows"))
        if later := mixture.sources[name].schedule:
            points = sorted({0: mixture.sources[name].weight, **later}.items())
            branch.add("weight " + ", ".join(f"{weight:g} at step {step}" for step, weight in points))
        for cause, rows in shards.left_out.items():
            branch.add(escape(f"left out: {rows:,} rows {cause}"))
    for name, folder in missing.items():
        branch = tree.add(f"[bold]{escape(name)}[/]  {shares[name]:.1%} of the prompts, [yellow]not there yet[/]")
        branch.add(escape(f"{folder}: no such folder; `mmopd prepare CONVERTER {folder}` writes it"))
    return tree


def to_dict(mixture: Mixture, prompts: int | None) -> dict[str, Any]:
    """Return what `mixture_tree` shows, as JSON types.

    Raises:
        ConfigError, DataError: as for `mixture_tree`.
    """
    opened, shares, prompts, missing = _opened(mixture, prompts)
    sources = {
        name: {
            "shards": str(mixture.sources[name].shards),
            "share": shares[name],
            "epochs": prompts * shares[name] / len(shards),
            "schedule": mixture.sources[name].schedule,
            "bytes": shards.bytes,
            **_totals(shards.totals()),
            "tasks": [
                {"task": task, "modality": modality, "rows": rows}
                for (task, modality), rows in sorted(shards.kinds.items())
            ],
            "left_out": dict(shards.left_out),
        }
        for name, shards in opened.items()
    }
    totals = _totals(_sum([shards.totals() for shards in opened.values()]))
    return {"prompts": prompts, **totals, "sources": sources, "missing": missing}


def _opened(
    mixture: Mixture, prompts: int | None
) -> tuple[Mapping[str, Shards], Mapping[str, float], int, Mapping[str, str]]:
    """Open the sources that are there.

    Returns:
        The sources; the shares of all sources; the number of prompts drawn; the folder of each source that is missing.
    """
    tasks = load_tasks()
    check_tasks(mixture, tasks)
    missing = {
        name: str(source.shards)
        for name, source in mixture.sources.items()
        if not is_remote(source.shards) and not Path(source.shards).exists()
    }
    there = {name: source for name, source in mixture.sources.items() if name not in missing}
    opened = open_mixture(mixture.model_copy(update={"sources": there}), tasks, Path.cwd())
    total = sum(source.weight for source in mixture.sources.values())
    shares = {name: source.weight / total for name, source in mixture.sources.items()}
    if prompts is None:
        prompts = int(
            min((len(opened[name]) / share for name, share in shares.items() if share and name in opened), default=0)
        )
    return opened, shares, prompts, missing


def _totals(totals: Totals) -> dict[str, int | None]:
    return {
        "rows": totals.rows,
        "images": totals.images,
        "text_tokens": totals.text,
        "image_tokens": totals.visual,
    }


def _sum(parts: list[Totals]) -> Totals:
    def add(values: list[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return sum(known) if len(known) == len(values) else None

    return Totals(
        sum(p.rows for p in parts),
        sum(p.images for p in parts),
        add([p.text for p in parts]),
        add([p.visual for p in parts]),
    )
