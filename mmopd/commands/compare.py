"""`mmopd compare`: run a grid of variants and seeds, and write tables with intervals and paired differences.

The name of a run contains a hash of its variant, settings and seed, so that tables share runs, a stopped comparison
continues with the next run, and a changed setting is another run. Each run is a run of `mmopd train` with its own
folder. The servers stay up from one run to the next, and runs that need the same servers follow each other.
"""

import csv
import hashlib
import io
import json
import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import t as student_t

from mmopd import catalog
from mmopd.commands.train import launch
from mmopd.config import Comparison, ComparisonTable, Recipe
from mmopd.errors import DataError, UserError, kind_of
from mmopd.evaluate.table import Results
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stage, Stages
from mmopd.runtime.rank_processes import last_metrics
from mmopd.runtime.run_folder import RunFolder, alone_in
from mmopd.runtime.step_lines import one_line
from mmopd.serving.repeatable import UNREPEATABLE
from mmopd.teacher.fleet import Standing

CONFIDENCE = 0.95
AVERAGE = "average"
WIDTH = 140  # width of the lines in the log of a run


@dataclass(frozen=True, slots=True)
class Run:
    """A variant with a seed."""

    variant: str
    seed: int
    settings: Mapping[str, Any]  # key.path -> value
    folder: Path

    @property
    def finished(self) -> bool:
        """True if it has its scores."""
        return (self.folder / "results.json").is_file()


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds with its 95 % interval (Student's t); one seed has no interval."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Return the interval of independent values, at least one."""
        n = len(values)
        half = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(values) / math.sqrt(n) if n > 1 else None
        return cls(fmean(values), half, n)

    def text(self, *, sign: bool = False) -> str:
        """Return the text `81.5 ± 1.2`."""
        return f"{self.mean:{'+' if sign else ''}.1f}" + (f" ± {self.half:.1f}" if self.half is not None else "")


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a table: for each column the interval of the score, and that of the difference to the baseline."""

    label: str
    kind: str  # base | teacher | variant
    score: Mapping[str, Interval]
    difference: Mapping[str, Interval]  # paired by seed; empty for the baseline, the base and the teachers


def plan_runs(comparison: Comparison, out: Path) -> dict[tuple[str, int], Run]:
    """Return every run that the tables need, by (variant, seed), in the order of the tables."""
    runs: dict[tuple[str, int], Run] = {}
    for table in comparison.tables.values():
        for seed in range(table.seeds):
            for variant in dict.fromkeys((table.baseline, *table.variants)):
                settings = {**comparison.set, **comparison.variants[variant].set, "seed": seed}
                written = json.dumps([str(comparison.recipe), settings], default=str)  # keys of all types become texts
                made_of = json.dumps(json.loads(written), sort_keys=True)
                name = f"{variant}-seed{seed}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
                runs.setdefault((variant, seed), Run(variant, seed, settings, out / "runs" / name))
    return runs


def run_all(comparison: Comparison, runs: Sequence[Run], servers: Path, stages: Stages) -> None:
    """Make the runs that are not finished, one after the other.

    Args:
        comparison: the comparison.
        runs: all its runs.
        servers: folder for the logs of the servers.
        stages: where the progress is shown.

    Raises:
        UserError: the settings of a run are wrong (checked before any run begins), or a run failed; the message names
            its log. Earlier runs are kept.
    """
    todo = [(run, resolve(comparison, run)) for run in runs if not run.finished]
    todo.sort(key=lambda one: json.dumps(what_is_served(one[1]), sort_keys=True))
    with stages.stage("runs") as stage, Children() as children, Standing(children, servers, stages) as standing:
        stage.total(len(runs), done=len(runs) - len(todo))
        for run, recipe in todo:
            _run(run, recipe, standing, stage)
            stage.advance()
        stage.outcome = f"{len(todo)} made, {len(runs) - len(todo)} already finished"


def resolve(comparison: Comparison, run: Run) -> Recipe:
    """Return the recipe of a run.

    Raises:
        UserError: its settings give no valid recipe; the message names the variant.
    """
    overrides = [f"{key}={json.dumps(value)}" for key, value in run.settings.items()]  # JSON is YAML
    try:
        return catalog.load_recipe(comparison.recipe, overrides=overrides, key="recipe")
    except UserError as error:
        raise kind_of(error.exit_status)(f"variant {run.variant!r} of the comparison: {error}") from None


def what_is_served(recipe: Recipe) -> list[Any]:
    """Return the settings that determine the servers of a run: student, its engine, fleet, and reference teachers."""
    references = recipe.algorithm.objective.references()
    return [recipe.student.model_dump(mode="json"), str(recipe.fleet), references]


def _run(run: Run, recipe: Recipe, standing: Standing, stage: Stage) -> None:
    folder = RunFolder(run.folder)
    log = run.folder.with_suffix(".log")
    if folder.recipe_file.is_file():
        recipe = folder.recipe()
    else:
        folder.create(recipe)
    try:
        with log.open("a", encoding="utf-8") as file, _followed(run, folder, stage):
            launch(folder, recipe, Console(file=file, width=WIDTH), standing=standing)
    except UserError as error:
        way_out = f"Its log is {log}; run the same command again to continue it, or remove its folder to start it again"
        raise kind_of(error.exit_status)(f"{run.folder.name}: {error}\n{way_out}") from error


@contextmanager
def _followed(run: Run, folder: RunFolder, stage: Stage) -> Iterator[None]:
    """Show the last step of the run while the block lasts."""
    over = threading.Event()

    def follow() -> None:
        while not over.wait(1.0):
            try:
                latest = last_metrics(folder.metrics)
            except DataError:
                return  # the run itself ends with this error
            progress = f"step {int(latest['step']) + 1}  {one_line(latest)}" if latest else "starting"
            stage.note(f"{run.variant}, seed {run.seed}: {progress}")

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def lines(
    comparison: Comparison, table: ComparisonTable, runs: Mapping[tuple[str, int], Run]
) -> tuple[list[str], list[Line]]:
    """Return (columns, rows) of a table: base and teachers, then a line for each variant.

    Raises:
        UserError: a run has no score in a column.
    """
    results = {key: Results.read(run.folder / "results.json") for key, run in runs.items() if key[1] < table.seeds}
    first = results[table.baseline, 0]
    columns = list(first.columns)
    found = [
        Line(row.name, row.kind, {c: Interval(s, None, 1) for c in columns if (s := row.score(c)) is not None}, {})
        for row in first.rows
        if row.kind != "distilled"
    ]
    scores = {
        variant: [_scores(results[variant, seed], columns, runs[variant, seed]) for seed in range(table.seeds)]
        for variant in dict.fromkeys((table.baseline, *table.variants))
    }
    for variant in table.variants:
        by_seed = scores[variant]
        paired = list(zip(scores[variant], scores[table.baseline], strict=True))
        means = {c: Interval.of([s[c] for s in by_seed]) for c in by_seed[0]}
        differences = (
            {c: Interval.of([a[c] - b[c] for a, b in paired]) for c in by_seed[0]} if variant != table.baseline else {}
        )
        found.append(Line(comparison.variants[variant].label or variant, "variant", means, differences))
    return columns + [AVERAGE] * (len(columns) > 1), found


def _scores(results: Results, columns: Sequence[str], run: Run) -> dict[str, float]:
    distilled = next(row for row in results.rows if row.kind == "distilled")
    scores = {c: score for c in columns if (score := distilled.score(c)) is not None}
    if missing := [c for c in columns if c not in scores]:
        raise UserError(
            f"{run.folder}: no score in {', '.join(missing)}; see its results.md, and remove the folder to make the "
            "run again"
        )
    return scores | ({AVERAGE: fmean(scores.values())} if len(columns) > 1 else {})


def markdown(table: ComparisonTable, columns: Sequence[str], rows: Sequence[Line]) -> str:
    """Return the table in Markdown: scores, then differences to the baseline."""

    def cells() -> Iterator[list[str]]:
        for row in rows:
            scores = [row.score[c].text() if c in row.score else "–" for c in columns]
            yield [
                row.label,
                *scores,
                *(row.difference[c].text(sign=True) if c in row.difference else "" for c in columns),
            ]

    head = ["", *columns, *(f"Δ {c}" for c in columns)]
    body = [head, ["---", *["---:"] * (len(head) - 1)], *cells()]
    seeds = "1 seed" if table.seeds == 1 else f"{table.seeds} seeds"
    foot = f"{seeds}; mean and {CONFIDENCE:.0%} interval over seeds; Δ is paired with {table.baseline} by seed."
    return f"### {table.title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in body) + f"\n\n{foot}\n"


def long_csv(name: str, columns: Sequence[str], rows: Sequence[Line]) -> str:
    """Return CSV with one line for each table, row and column."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["table", "row", "kind", "column", "mean", "half", "n", "difference", "difference_half"])
    for row in rows:
        for c in (c for c in columns if c in row.score):
            score = row.score[c]
            difference = row.difference.get(c)
            paired = [difference.mean, difference.half] if difference else ["", ""]
            writer.writerow([name, row.label, row.kind, c, score.mean, score.half, score.n, *paired])
    return file.getvalue()


def draw(path: Path, table: ComparisonTable, columns: Sequence[str], rows: Sequence[Line]) -> None:
    """Draw a panel for each column: the variants with their intervals; base and best teacher as lines."""
    shown = [row for row in rows if row.kind == "variant"]
    figure = Figure(figsize=(1.2 + 3.2 * len(columns), 1.3 + 0.32 * len(shown)), layout="constrained")
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns, strict=True):
        for kind, colour, best in (("base", "#999999", min), ("teacher", "#2f6f9f", max)):
            if values := [row.score[column].mean for row in rows if row.kind == kind and column in row.score]:
                axes.axvline(best(values), color=colour, linewidth=1, linestyle=":", label=kind)
        scores = [row.score[column] for row in shown]
        axes.errorbar(
            [s.mean for s in scores],
            range(len(shown)),
            xerr=[s.half or 0 for s in scores],
            fmt="o",
            color="#1b3a57",
            capsize=3,
        )
        axes.set_yticks(range(len(shown)), [row.label for row in shown])
        axes.set_title(column, fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.suptitle(table.title, fontsize=11)
    figure.savefig(path, dpi=150)


def warnings_of(engines: Collection[str]) -> list[str]:
    """Return a warning for the page if the kernels of the runs' engines differ, or if their answers do not repeat.

    Args:
        engines: the kernels of the engines of all runs (`serving.repeatable.kernels`).
    """
    found = " | ".join(sorted(engines))
    if len(engines) > 1:
        return [f"The runs' engines compute differently ({found}): last bits differ also where nothing else does.\n"]
    if UNREPEATABLE in found:
        return [f"A repeated run samples other responses: the engines have {found} (`engine.repeatable`).\n"]
    return []


def compare(name: str, comparison: Comparison, out: Path, stages: Stages) -> Path:
    """Make the runs; write `NAME.md`, `NAME.csv` and a PNG for each table into `out`; return the path of the page.

    Raises:
        UserError: a run failed, a score is missing, or another comparison is using `out`.
    """
    runs = plan_runs(comparison, out)
    with alone_in(out):
        run_all(comparison, list(runs.values()), out / "servers", stages)
    page = [f"# {name}\n"]
    rows_of_all = []
    for key, table in comparison.tables.items():
        columns, rows = lines(comparison, table, runs)
        picture = out / f"{name}-{key}.png"
        draw(picture, table, columns, rows)
        page.append(markdown(table, columns, rows) + f"\n![{table.title}]({picture.name})\n")
        rows_of_all.append(long_csv(key, columns, rows))
    page += warnings_of({RunFolder(run.folder).kernels() or "unknown" for run in runs.values()})
    (out / f"{name}.md").write_text("\n".join(page), encoding="utf-8")
    head, *_ = rows_of_all[0].splitlines(keepends=True)
    (out / f"{name}.csv").write_text(
        head + "".join(line for text in rows_of_all for line in text.splitlines(keepends=True)[1:]), encoding="utf-8"
    )
    return out / f"{name}.md"
