"""Measures a served model on a suite: each row by its runner, its result from the cache where it is known already."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmopd import settings_file
from mmopd.config import Suite
from mmopd.config.suite import Benchmark
from mmopd.errors import ConfigError
from mmopd.evaluate.runners import RUNNERS
from mmopd.evaluate.runners.base import Asked, Done, Job
from mmopd.evaluate.score import BenchmarkScore, Measured, key_of
from mmopd.evaluate.served import Served
from mmopd.serving.endpoint import Endpoint

OnResult = Callable[[BenchmarkScore], None]


def read_suite(path: Path, workspace: Path) -> Suite:
    """Read a suite and make its paths absolute: task files from the suite's folder, data from the workspace.

    Raises:
        ConfigError: the file cannot be read, two columns have the same name, or a task file is missing.
    """
    suite = settings_file.read(Suite, path)
    columns = [b.column for b in suite.benchmarks]
    for column in columns:
        if columns.count(column) > 1:
            raise ConfigError(f"{path}: two benchmarks have the column {column!r}; rename one of them")
    try:
        benchmarks = tuple(row.resolved(path.parent, workspace) for row in suite.benchmarks)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return suite.model_copy(update={"benchmarks": benchmarks})


def warm_up(suite: Suite) -> None:
    """Begin what the runners of a suite need and what takes long, while servers start."""
    for name in dict.fromkeys(row.runner for row in suite.benchmarks):
        RUNNERS[name].warm_up()


def evaluate(
    endpoint: Endpoint,
    suite: Suite,
    *,
    out: Path,
    model: Path | None = None,
    weights: str = "",
    served: Served | None = None,
    cache: Path | None = None,
    objection: Callable[[], str] = lambda: "",
    on_result: OnResult = lambda record: None,
) -> list[BenchmarkScore]:
    """Measure a served model on every benchmark of a suite (of `read_suite`).

    Args:
        out: gets a folder per benchmark with its record and what its runner writes; an earlier folder is replaced.
        model: folder of the model; None if it is served elsewhere.
        weights: hash of the served model's files (`hash_model`), part of the key under which a record is reused.
        served: what is known of the model; its family decides the prompts, unless the suite does.
        cache: folder where valid records are kept and found again; only used with `weights`.
        objection: called after each measurement; returns a reason why it does not count, or "".
        on_result: called with each record.

    Returns:
        One record per benchmark, in the suite's order; its status is failed if the benchmark could not be measured.

    Raises:
        UserError: a package of a runner is not installed.
        ConfigError: a task is missing, or a runner would misread the model name.
        DataError: the data of a task is missing.
    """
    jobs: list[Job[Any]] = []
    for row in suite.benchmarks:
        folder = out / _slug(endpoint.name) / _slug(row.column)
        shutil.rmtree(folder, ignore_errors=True)
        asked: Asked[Benchmark] = Asked(
            row=row,
            suite=suite,
            endpoint=endpoint,
            served=served or Served(),
            model=model,
            weights=weights,
            folder=folder,
            cache=cache,
            objection=objection,
        )
        jobs.append(RUNNERS[row.runner].prepare(asked))
    records: dict[str, BenchmarkScore] = {}

    def store(job: Job[Any], record: BenchmarkScore) -> None:
        records[record.column] = record
        record.write(job.asked.folder / "record.json")
        on_result(record)

    todo: dict[str, list[Job[Any]]] = {}
    for job in jobs:
        if (kept := _kept(job)) is not None and kept.is_file():
            store(job, _reused(job, kept))
        else:
            todo.setdefault(job.asked.row.runner, []).append(job)
    for runner, some in todo.items():
        for done in RUNNERS[runner].measure(some):
            record = _record(done, objection)
            if (kept := _kept(done.job)) is not None and record.status == "ok":
                record.write(kept)
            store(done.job, record)
    return [records[row.column] for row in suite.benchmarks]


def _kept(job: Job[Any]) -> Path | None:
    """Return the file under which a valid result is kept; None if the weights are not known."""
    asked = job.asked
    if asked.cache is None or not asked.weights:
        return None
    return asked.cache / f"{key_of(asked.weights, *job.code, job.data, job.settings, job.versions)}.json"


def _reused(job: Job[Any], kept: Path) -> BenchmarkScore:
    endpoint = job.asked.endpoint
    return dataclasses.replace(
        BenchmarkScore.read(kept),
        endpoint=endpoint.name,
        role=endpoint.role,
        column=job.asked.row.column,
        reused=True,
    )


def _record(done: Done[Job[Any]], objection: Callable[[], str]) -> BenchmarkScore:
    """Return the record of a measurement, which does not count if there is an objection."""
    job = done.job
    asked = job.asked
    reason = done.found if isinstance(done.found, str) else objection()
    measured = None if reason or not isinstance(done.found, Measured) else done.found
    return BenchmarkScore(
        endpoint=asked.endpoint.name,
        role=asked.endpoint.role,
        column=asked.row.column,
        task=job.task,
        metric=job.metric,
        status="failed" if measured is None else "ok",
        reason=reason,
        score=measured.score if measured else None,
        stderr=measured.stderr if measured else None,
        n=measured.n if measured else None,
        weights=asked.weights,
        data=job.data,
        settings={**job.settings, **(measured.sent if measured else {})},
        versions={**job.versions, **(measured.versions if measured else {})},
        seconds=round(done.seconds, 2),
        more=measured.more if measured else {},
    )


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)
