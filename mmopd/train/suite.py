"""The suite of `evaluate.suite` between steps, in a process of its own, so that no library of a benchmark sees a rank.

Usage: `python -m mmopd.train.suite RUN STEPS`, where STEPS counts the updates of the weights that the engines have.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmopd import catalog
from mmopd.config import Recipe, Suite
from mmopd.errors import DataError, UserError
from mmopd.evaluate import BenchmarkScore, Results, Row, evaluate, read_suite
from mmopd.evaluate.served import Served
from mmopd.rollout.collect import version_of
from mmopd.rollout.sync import FileSync, SyncError
from mmopd.runtime import logs, python
from mmopd.runtime.processes import Children
from mmopd.runtime.run_folder import RunFolder
from mmopd.serving import endpoint
from mmopd.serving.endpoint import Endpoint

logger = logging.getLogger("mmopd.train.suite")

LOOK_EVERY = 0.5  # seconds
# Variables that describe a training rank. Libraries of benchmarks would join its group by them.
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def suite_between_steps(recipe: Recipe) -> Suite | None:
    """Return the suite that is run between steps, with `evaluate.limit`; None if there is none.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    if recipe.evaluate is None or recipe.evaluate.suite is None:
        return None
    suite = read_suite(catalog.find(recipe.evaluate.suite, key="evaluate.suite"), Path.cwd())
    limit = recipe.evaluate.limit
    if limit is None:
        return suite
    return suite.model_copy(
        update={"benchmarks": tuple(one.model_copy(update={"limit": limit}) for one in suite.benchmarks)}
    )


class SuiteRuns:
    """Runs of the suite, one at a time."""

    def __init__(self, run: RunFolder, suite: Suite) -> None:
        self._run = run
        self._suite = suite
        self._children = Children()

    def close(self) -> None:
        """End what still runs."""
        self._children.stop_all()

    async def scores(self, done: int, stopping: Callable[[], bool]) -> dict[str, float]:
        """Return the scores of the weights after `done` updates as metrics; a benchmark without a score is counted.

        Args:
            done: updates of the weights, which the engines have.
            stopping: returns whether the run has to stop; then the benchmarks that still run have no score.
        """
        command = python.command("-m", "mmopd.train.suite", str(self._run.root), str(done))
        child = self._children.start("suite", command, self._run.logs / "suite.log")
        while child.alive:
            if stopping():
                child.terminate()
            await asyncio.sleep(LOOK_EVERY)
        results = folder_of(self._run, done) / "results.json"
        try:
            records = [record for row in Results.read(results).rows for record in row.records]
        except (DataError, OSError):
            logger.warning("the suite has no results after step %d; %s says why", done, child.log)
            records = []
        for record in records:
            if record.status == "failed":
                logger.warning("%s has no score after step %d: %s", record.column, done, record.reason)
        return metrics_of(records, len(self._suite.benchmarks))


def folder_of(run: RunFolder, done: int) -> Path:
    """Return the folder with the results, the responses and the logs of the weights after `done` updates."""
    return run.between_steps / f"step-{done}"


def metrics_of(records: list[BenchmarkScore], benchmarks: int) -> dict[str, float]:
    """Return scores and their standard errors, 0-100, and how many of the benchmarks have none."""
    found: dict[str, float] = {}
    for record in records:
        if record.score is not None:
            found[f"suite/{record.column}"] = record.score
            if record.stderr is not None:
                found[f"suite_error/{record.column}"] = record.stderr
    return found | {"suite_failed": float(benchmarks - sum(record.score is not None for record in records))}


def run_suite(run: RunFolder, done: int) -> None:
    """Run the suite against the student's engines, which share its benchmarks, and write the results.

    A score counts only if the engine has the weights after `done` updates before and after the benchmark.

    Raises:
        UserError: as `evaluate`.
    """
    recipe = run.recipe()
    suite = suite_between_steps(recipe)
    assert suite is not None
    engines, _ = endpoint.load_by_role(run.endpoints)
    out = folder_of(run, done)
    served = Served.of(recipe.student.model, recipe.student.engine)

    def share(number: int) -> list[BenchmarkScore]:
        mine = suite.model_copy(update={"benchmarks": suite.benchmarks[number :: len(engines)]})
        engine = engines[number]
        return evaluate(
            engine,
            mine,
            out=out,
            model=recipe.student.model,
            served=served,
            objection=lambda: other_weights(engine, version_of(done)),
        )

    with ThreadPoolExecutor(len(engines)) as pool:
        records = [record for some in pool.map(share, range(len(engines))) for record in some]
    places: Mapping[str, int] = {one.column: n for n, one in enumerate(suite.benchmarks)}
    records.sort(key=lambda record: places[record.column])
    Results.of([Row(f"step {done}", "distilled", tuple(records))]).write(out)


def other_weights(engine: Endpoint, version: str) -> str:
    """Return what is wrong if an engine does not have the weights of a version; otherwise nothing."""
    with FileSync([engine]) as link:
        try:
            [found] = link.versions()
        except SyncError as error:
            return f"the student's engine does not say its weights: {error}"
    return "" if found == version else f"the student's engine has weights {found!r}, not {version!r}"


def main() -> int:
    """Run the suite once; return the exit status, 0 or that of the UserError."""
    for name in OF_RANKS:
        os.environ.pop(name, None)
    logs.start("suite")
    try:
        run_suite(RunFolder(Path(sys.argv[1])), int(sys.argv[2]))
    except UserError as error:
        logger.error("%s", error)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
