"""`mmopd difficulty`: measure how often the untrained student is right on each prompt."""

import dataclasses
from pathlib import Path

from rich.console import Console

from mmopd.commands.job import check, prepare
from mmopd.config import Recipe
from mmopd.passes.difficulty import run_pass
from mmopd.passes.each_row import answering
from mmopd.prompts import difficulty_counts
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.runtime.run_folder import make_private
from mmopd.serving.servers import serve_in_stage
from mmopd.serving.specs import student_specs


def measure(recipe: Recipe, out: Path, console: Console) -> None:
    """Run `mmopd difficulty`: prepare, serve the student, measure, and print the result; nothing is trained.

    Raises:
        UserError: same cases as `prepare`, `check` and `run_pass`, or the engine ended.
    """
    logs = make_private(out) / "logs"
    logs.mkdir(exist_ok=True)
    with Stages(console) as stages, Children() as children:
        prepare(recipe, stages)
        job = check(recipe)
        specs = [dataclasses.replace(spec, updatable=False, sync="file") for spec in student_specs(recipe.student)]
        with (
            serve_in_stage(specs, children, logs, stages) as servers,
            stages.stage("difficulty") as stage,
            answering(servers, logs),
        ):
            measured = run_pass(
                job.sources,
                list(servers.values()),
                out,
                stage,
                student=recipe.student,
                rollout=recipe.rollout,
                algorithm=recipe.algorithm,
                timeout=recipe.train.timeout,
            )
    console.print(difficulty_counts.table(measured))
    console.print(
        f"Histogram before and after balancing: {out / difficulty_counts.PICTURE}", highlight=False, markup=False
    )
