"""Evaluates served models on a suite, one row of a table each: base, teachers, distilled student, or any folders."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mmopd.config import Engine, Suite
from mmopd.errors import UserError
from mmopd.evaluate.run import evaluate
from mmopd.evaluate.score import BenchmarkScore
from mmopd.evaluate.served import Served
from mmopd.evaluate.table import Kind, Results, Row
from mmopd.runtime.fingerprint import hash_model
from mmopd.runtime.progress import Stages
from mmopd.serving.endpoint import Endpoint

CACHE = Path(".mmopd") / "eval"  # folder of the workspace, shared by its runs


@dataclass(frozen=True, slots=True)
class Candidate:
    """A served model to evaluate; one row of the results table."""

    name: str
    kind: Kind
    endpoint: Endpoint
    model: Path | None  # its folder; None if it is served elsewhere
    engine: Engine  # with which it is served here
    adapter: bool = False  # it is served with an adapter: the folder does not have all of its weights
    objection: Callable[[], str] = lambda: ""  # returns why a measurement does not count, or ""


def evaluate_all(suite: Suite | None, candidates: Sequence[Candidate], out: Path, stages: Stages) -> list[Row]:
    """Run the suite on each candidate.

    Results of the same weights, data and settings are taken from the cache.
    """
    if suite is None:
        return []
    rows: list[Row] = []
    with stages.stage(f"evaluate {', '.join(c.name for c in candidates)}") as stage:
        stage.total(len(candidates) * len(suite.benchmarks))

        def show(record: BenchmarkScore) -> None:
            stage.advance()
            stage.note(f"{record.endpoint}, {record.column}: {record.reason or f'{record.score:.1f}'}")

        for candidate in candidates:
            endpoint = dataclasses.replace(candidate.endpoint, name=candidate.name)
            model = candidate.model
            records = evaluate(
                endpoint,
                suite,
                out=out,
                model=model,
                weights=hash_model(model) if model and not candidate.adapter else "",
                served=Served.of(model, candidate.engine) if model else None,
                cache=CACHE,
                objection=candidate.objection,
                on_result=show,
            )
            rows.append(Row(candidate.name, candidate.kind, tuple(records)))
        reused = sum(record.reused for row in rows for record in row.records)
        stage.outcome = (
            f"{len(rows) * len(suite.benchmarks) - reused} benchmarks measured, {reused} results from the cache"
        )
    return rows


def print_results(results: Results, console: Console) -> None:
    """Print the table, if it has any rows."""
    if results.rows:
        console.print(results.rich(title="Score on held-out data, 0-100"))
        for note in results.notes():
            console.print(note, highlight=False, markup=False)


def check_results(results: Results) -> None:
    """Check that every benchmark has a score.

    Raises:
        UserError: a benchmark has none; says why.
    """
    if failed := results.failures():
        raise UserError(
            "\n".join(f"{record.column} of {record.endpoint} has no score: {record.reason}" for record in failed)
        )
