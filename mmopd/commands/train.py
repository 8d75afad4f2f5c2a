"""`mmopd train`: run the stages of a run in order, on this machine. `launch` calls one function for each stage."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.console import Console

from mmopd.commands.distil import distil, extrapolate
from mmopd.commands.job import Job, check, preparation, prepare, prove, serving
from mmopd.commands.teachers import check_teachers
from mmopd.commands.watch import watching
from mmopd.config import Engine, Recipe
from mmopd.evaluate.candidates import Candidate, check_results, evaluate_all, print_results
from mmopd.evaluate.run import warm_up
from mmopd.evaluate.table import Results, Row
from mmopd.passes.answers import run_answers
from mmopd.passes.difficulty import run_pass
from mmopd.passes.each_row import answering
from mmopd.preflight.run import insist
from mmopd.prompts import difficulty_counts
from mmopd.prompts.shards import Shards
from mmopd.report.html import write_report
from mmopd.report.loggers.start import check_installed, logging_to
from mmopd.report.metrics import read_lines
from mmopd.report.model_card import CARD, model_card
from mmopd.rollout.sync import FRESH, FileSync, SyncError
from mmopd.runtime import logs
from mmopd.runtime.network import HOST
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.runtime.run_folder import RunFolder, alone_in
from mmopd.runtime.status import LAUNCHER, telling
from mmopd.runtime.time_left import usual_seconds
from mmopd.runtime.time_limit import start_limit
from mmopd.serving import endpoint, repeatable
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.placement import check_gpus
from mmopd.serving.servers import Servers
from mmopd.teacher import identity
from mmopd.teacher.fleet import Standing, warn_of


def launch(
    run: RunFolder,
    recipe: Recipe,
    console: Console,
    *,
    endpoints: Sequence[Path] = (),
    changed: Sequence[str] = (),
    changed_teachers: Sequence[str] = (),
    launcher: Sequence[str] = (),
    host: str = HOST,
    standing: Standing | None = None,
    watch: bool = False,
) -> None:
    """Prepare, serve, examine the teachers, measure difficulty, evaluate, distil, evaluate, report.

    Args:
        run: the run folder.
        recipe: the recipe.
        console: where the progress is shown.
        endpoints: files of `mmopd serve`; the teachers in them are used from there.
        changed: sources that were added to the mixture or removed from it on purpose, before a resume.
        changed_teachers: teachers that are others than before a resume, on purpose.
        launcher: a command that starts the ranks on several machines, such as `deepspeed --hostfile hosts --module`.
        host: address that the servers listen on, for ranks on other machines.
        standing: servers of the previous run; used if this run needs the same ones, otherwise started again.
        watch: serve a live page of the run while it lasts.

    Raises:
        UserError: a problem that the user can fix; all processes are stopped, all measurements are kept.
    """
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed, which transformers imports, warns that it found no other accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warn_of(host, console)
    check_installed(recipe.loggers)
    if recipe.algorithm.objective.trains:
        check_gpus(recipe, elsewhere=bool(launcher))
    with (
        alone_in(run.root),
        logs.to_file(run.logs / "launcher.log", "launcher"),
        Stages(console, run.timings) as stages,
        watching(run, console) if watch else nullcontext(),
        telling(run.status_of(LAUNCHER), stages.now),
    ):
        start_limit(run, recipe.train.minutes)
        # A preparation may say what the stages of its runs usually take, by title.
        stages.expect(usual_seconds(run, recipe, otherwise=getattr(preparation(recipe), "USUAL_SECONDS", {})))
        prepare(recipe, stages)
        job = dataclasses.replace(check(recipe, endpoints), changed=changed, launcher=launcher, host=host)
        check_teachers(job, run, changed_teachers, console)
        say_left_out(job.sources, console)
        say_kernels(job.engines, run, console)
        if job.suite is not None:
            warm_up(job.suite)
        with logging_to(recipe.loggers, run, console):
            with Children() as children, serving(job, run, children, stages, standing) as servers:
                insist(prove(job, servers, run, stages), console)
                measure_difficulty(job, servers, run, stages)
                sample_answers(job, servers, run, stages)
                rows = evaluate_all(job.suite, starting_points(job, servers), run.evaluation, stages)
                learn = distil if recipe.algorithm.objective.trains else extrapolate
                learn(job, run, children, servers, stages)
                rows += evaluate_all(job.suite, [distilled(job, servers, run)], run.evaluation, stages)
            finish(run, rows, stages)


def say_left_out(sources: Mapping[str, Shards], console: Console) -> None:
    """Print the sources with rows that are left out, and the number of rows."""
    for name, shards in sources.items():
        if left := shards.left_out.total():
            console.print(
                f"source {name}: {left:,} rows are left out by max_prompt_tokens, {len(shards):,} are used",
                highlight=False,
                markup=False,
            )


def say_kernels(engines: Sequence[Engine], run: RunFolder, console: Console) -> None:
    """Record the kernels that decide the last bits of the engines' answers; warn if a resume changes them."""
    gpu = torch.cuda.is_available()
    now = " and ".join(sorted({repeatable.kernels(engine, gpu=gpu) for engine in engines}))
    resumed = bool(read_lines(run.metrics))
    before = run.note_kernels(now)
    if resumed and before:
        said = (
            f"engines compute with {now}, and before the resume with {before}: "
            "the run does not repeat an uninterrupted one bit for bit"
        )
    elif resumed and not all(repeatable.holds(engine, gpu=gpu) for engine in engines):
        said = (
            f"engines compute with {now}: "
            "a resumed run does not repeat an uninterrupted one bit for bit (engine.repeatable)"
        )
    else:
        return
    console.print(said, highlight=False, markup=False, soft_wrap=True)


def measure_difficulty(job: Job, servers: Servers, run: RunFolder, stages: Stages) -> None:
    """Measure the difficulty for offline balancing: the untrained student answers every prompt.

    Counts, weights and the heat map go to the run folder.

    Raises:
        ServerError: the engine ended; the message has the last lines of its log.
    """
    if job.recipe.algorithm.difficulty is None:
        return
    if (run.difficulty / difficulty_counts.FILE).is_file() and difficulty_counts.load(
        run.difficulty / difficulty_counts.FILE
    ).keys() == job.sources.keys():
        return
    with stages.stage("difficulty") as stage, answering(servers, run.logs):
        run_pass(
            job.sources,
            endpoint.load_by_role(run.endpoints)[0],
            run.difficulty,
            stage,
            student=job.recipe.student,
            rollout=job.recipe.rollout,
            algorithm=job.recipe.algorithm,
            timeout=job.recipe.train.timeout,
        )


def sample_answers(job: Job, servers: Servers, run: RunFolder, stages: Stages) -> None:
    """Sample the teachers' answers to every prompt for SFT, and save the right ones next to the shards.

    Raises:
        ServerError: a teacher's server ended; the message has the last lines of its log.
        DataError: no answer is right.
    """
    if not job.recipe.algorithm.objective.teacher_answers():
        return
    _, teachers = endpoint.load_by_role(run.endpoints)
    with stages.stage("answers") as stage, answering(servers, run.logs, "a teacher did not answer: "):
        run_answers(
            job.sources,
            teachers,
            stage,
            student=job.recipe.student,
            fleet=job.fleet,
            rollout=job.recipe.rollout,
            algorithm=job.recipe.algorithm,
            timeout=job.recipe.train.timeout,
            identities=identity.known(run.teachers),
        )


def starting_points(job: Job, servers: Mapping[str, Endpoint]) -> list[Candidate]:
    """Return the student before training, and the first replica of each teacher."""
    student = job.recipe.student
    elsewhere = {endpoint.teacher for endpoint in job.elsewhere}
    teachers = [
        Candidate(
            name,
            "teacher",
            servers[f"{name}.0"],
            None if name in elsewhere else teacher.model,
            teacher.engine,
            adapter=teacher.adapter is not None,
        )
        for name, teacher in job.fleet.teachers.items()
    ]
    return [Candidate("base", "base", servers["student"], student.model, student.engine), *teachers]


def distilled(job: Job, servers: Servers, run: RunFolder) -> Candidate:
    """Return the student's engine with the trained weights as a candidate.

    An engine that was restarted has other weights, which its objection reports.
    """
    student = servers["student"]

    def objection() -> str:
        with FileSync([student]) as link:
            try:
                lost = link.versions() == [FRESH]
            except SyncError:
                lost = True
        again = f"`mmopd train --resume {run.root}` measures again"
        return f"the student's engine has died ({servers.log('student')}); {again}" if lost else ""

    return Candidate("distilled", "distilled", student, run.export, job.recipe.student.engine, objection=objection)


def finish(run: RunFolder, rows: Sequence[Row], stages: Stages) -> None:
    """Write the results table, the report and the model card.

    Raises:
        UserError: a benchmark has no score; all files are written nevertheless.
    """
    results = Results.of(rows)
    results.write(run.root)
    with stages.stage("report") as stage:
        write_report(run.root)
        (run.export / CARD).write_text(model_card(run), encoding="utf-8")
        stage.outcome = str(run.report)
    print_results(results, stages.console)
    stages.console.print(f"Model: {run.export}\nReport: {run.report}", highlight=False, markup=False)
    check_results(results)
