"""Served models through a suite, one row of a table each: base, teachers, the distilled student, or any folders (`mmopd
eval`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mmopd import catalog
from mmopd.config import Benchmark, Recipe, Suite
from mmopd.errors import UserError
from mmopd.evaluate.calls import warm_up
from mmopd.evaluate.lmms import BenchmarkScore, evaluate, read_suite
from mmopd.evaluate.table import Kind, Results, Row
from mmopd.runtime.fingerprint import hash_model
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.servers import serve_in_stage
from mmopd.serving.specs import ServerSpec

CACHE = Path(".mmopd") / "eval"  # of the workspace: what several runs share


@dataclass(frozen=True, slots=True)
class Candidate:
    """A served model that is evaluated, one row of the results table."""

    name: str
    kind: Kind
    endpoint: Endpoint
    model: Path | None  # the folder with exactly its weights; None if it runs elsewhere, or has an adapter
    objection: Callable[[], str] = lambda: ""  # why what was measured does not count, if it does not


def evaluate_all(suite: Suite | None, candidates: Sequence[Candidate], out: Path, stages: Stages) -> list[Row]:
    """The suite on each candidate; what was measured with the same weights, data and settings is taken from the cache."""
    if suite is None:
        return []
    rows: list[Row] = []
    with stages.stage(f"evaluate {', '.join(c.name for c in candidates)}") as stage:
        stage.total(len(candidates) * len(suite.benchmarks))

        def show(benchmark: Benchmark, record: BenchmarkScore | None) -> None:
            if record is not None:
                stage.advance()
                stage.note(f"{record.endpoint}, {benchmark.column}: {record.reason or f'{record.score:.1f}'}")

        for candidate in candidates:
            endpoint = dataclasses.replace(candidate.endpoint, name=candidate.name)
            weights = hash_model(candidate.model) if candidate.model else ""
            records = evaluate(
                endpoint, suite, out=out, weights=weights, cache=CACHE, objection=candidate.objection, on_event=show
            )
            rows.append(Row(candidate.name, candidate.kind, tuple(records)))
        reused = sum(record.reused for row in rows for record in row.records)
        stage.outcome = f"{len(rows) * len(suite.benchmarks) - reused} lmms-eval calls, {reused} results from the cache"
    return rows


def print_results(results: Results, console: Console) -> None:
    """The table, if there is anything in it."""
    if results.rows:
        console.print(results.rich(title="Score on held-out data, 0-100"))


def check_results(results: Results) -> None:
    """Every benchmark has a score.

    Raises:
        UserError: one has none; says why.
    """
    if failed := results.failures():
        raise UserError(
            "\n".join(f"{record.column} of {record.endpoint} has no score: {record.reason}" for record in failed)
        )


def evaluate_models(suite: Path, models: Sequence[Path], recipe: Recipe, out: Path, console: Console) -> None:
    """`mmopd eval`: serve one model after the other, and evaluate it.

    Raises:
        UserError: no such folder, or a server does not start.
    """
    resolved = read_suite(catalog.find(suite), Path.cwd())
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    warm_up()
    with Stages(console) as stages, Children() as children:
        for model in models:
            name = model.resolve().name
            spec = ServerSpec(name, model, recipe.student.engine, updatable=False)
            with serve_in_stage([spec], children, logs, stages) as servers:
                rows += evaluate_all(resolved, [Candidate(str(model), "base", servers[name], model)], out, stages)
    results = Results.of(rows)
    results.write(out)
    print_results(results, console)
    check_results(results)
