"""`mmopd train`: the stages of a run in order, on this machine. `launch` is the summary; each stage is a function below
it.
"""

import asyncio
import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from mmopd import catalog
from mmopd.commands.merge import Checkpoint, merge
from mmopd.config import SFT, Dense, ExPO, Fleet, Recipe, Suite
from mmopd.errors import UserError
from mmopd.evaluate.calls import warm_up
from mmopd.evaluate.candidates import Candidate, check_results, evaluate_all, print_results
from mmopd.evaluate.lmms import read_suite
from mmopd.evaluate.table import Results, Row
from mmopd.modality import Encoder
from mmopd.passes.answers import run_answers
from mmopd.passes.difficulty import run_pass
from mmopd.passes.each_row import answering
from mmopd.preflight.check import Check
from mmopd.preflight.questions import look
from mmopd.preflight.run import answers, insist, preflight, save, summary
from mmopd.prompts import difficulty_counts
from mmopd.prompts.shards import Shards, open_mixture
from mmopd.prompts.tokens import hash_processor
from mmopd.report.html import write_report
from mmopd.report.model_card import CARD, model_card
from mmopd.rollout.student_client import EngineError
from mmopd.rollout.sync import FRESH, FileSync, SyncError
from mmopd.runtime.network import HOST
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.runtime.rank_processes import Pulses, check_ranks, last_metrics, one_line, start_ranks
from mmopd.runtime.run_folder import RunFolder, alone_in
from mmopd.runtime.watchdog import asked_to_stop
from mmopd.serving import endpoint
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.servers import Servers, serve_in_stage
from mmopd.serving.specs import student_specs
from mmopd.task.load import load_tasks
from mmopd.teacher.fleet import Standing, from_files, serve_fleet, warn_of
from mmopd.teacher.router import check_routes, check_tokenizers, load_teachers, references, routed

UNTRAINED, MERGED = "untrained", "merged"  # versions of weights that do not come from a trainer


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a recipe refers to, found and checked."""

    recipe: Recipe
    fleet: Fleet  # the teachers that routes lead to; empty where the objective needs none
    references: Fleet | None  # theirs, where the objective has them
    sources: Mapping[str, Shards]
    suite: Suite | None
    elsewhere: Sequence[Endpoint] = ()  # of teachers that another `mmopd serve` serves
    changed: Sequence[str] = ()  # sources that were added or removed on purpose before a resume
    launcher: Sequence[str] = ()  # a command that starts the ranks; none: they are started here
    host: str = HOST  # the address that servers listen on


def launch(
    run: RunFolder,
    recipe: Recipe,
    console: Console,
    *,
    endpoints: Sequence[Path] = (),
    changed: Sequence[str] = (),
    launcher: Sequence[str] = (),
    host: str = HOST,
    standing: Standing | None = None,
) -> None:
    """Prepare, serve, prove the teachers, measure difficulty, evaluate, distil, evaluate, report.

    Args:
        endpoints: files of `mmopd serve`; the teachers in them are used from there.
        changed: sources that were added to the mixture or removed from it on purpose, before a resume.
        launcher: a command that starts the ranks on several machines, such as `deepspeed --hostfile hosts --module`.
        host: the address that the servers listen on, for ranks on other machines.
        standing: servers of the run before, used if they are those that this one needs; else they are started for this
            run alone.

    Raises:
        UserError: anything that a user can put right; whatever was started is stopped, what was measured is kept.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # DeepSpeed, which transformers imports, would warn that it found nothing else
    warn_of(host, console)
    with alone_in(run.root), Stages(console, run.timings) as stages:
        prepare(recipe, stages)
        job = dataclasses.replace(check(recipe, endpoints), changed=changed, launcher=launcher, host=host)
        say_left_out(job, console)
        if job.suite is not None:
            warm_up()
        with Children() as children, serving(job, run, children, stages, standing) as servers:
            insist(prove(job, servers, run, stages), console)
            measure_difficulty(job, servers, run, stages)
            sample_answers(job, servers, run, stages)
            rows = evaluate_all(job.suite, starting_points(job, servers), run.evaluation, stages)
            learn = extrapolate if isinstance(job.recipe.algorithm.objective, ExPO) else distil
            learn(job, run, children, servers, stages)
            rows += evaluate_all(job.suite, [distilled(servers, run)], run.evaluation, stages)
        finish(run, rows, stages)


def prepare(recipe: Recipe, stages: Stages) -> None:
    """Run the recipe's own preparation, if it has one."""
    if recipe.prepare is not None:
        path = catalog.find(recipe.prepare)
        with stages.stage("prepare") as stage:
            catalog.load_module(path).prepare(Path.cwd(), stage)


def check(recipe: Recipe, endpoints: Sequence[Path] = ()) -> Job:
    """Open all that the recipe names, before anything is started; the models of teachers in `endpoints` need not be on
    this machine.

    Raises:
        UserError: a file, a model, a shard, a task, a route or a tokenizer is missing or wrong; names it.
    """
    whole = load_teachers(recipe)
    fleet, before = routed(whole), references(whole, recipe.algorithm.objective)
    elsewhere = from_files(whole, endpoints)
    there = {endpoint.teacher for endpoint in elsewhere}
    used = {**fleet.teachers, **(before.teachers if before else {})}
    folders = {name: t.model for name, t in used.items() if t.model is not None and name not in there}
    for name, folder in {"student": recipe.student.model, **folders}.items():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: no model in this folder (of {name}); it needs a config.json and weights in safetensors"
            )
    tasks = load_tasks()
    sources = open_mixture(
        catalog.load_mixture(recipe.mixture), tasks, Path.cwd(), hash_processor(recipe.student.model)
    )
    for one in (fleet, before):
        if one and one.routes:
            check_routes(one, tasks, [pair for shards in sources.values() for pair in shards.kinds])
    check_tokenizers(recipe.student.model, folders)
    suite = read_suite(catalog.find(recipe.suite), Path.cwd()) if recipe.suite is not None else None
    return Job(recipe, fleet, before, sources, suite, elsewhere)


def say_left_out(job: Job, console: Console) -> None:
    """Name the sources of which rows are left out, and how many."""
    for name, shards in job.sources.items():
        if shards.left_out:
            console.print(
                f"source {name}: {shards.left_out:,} rows are left out by max_prompt_tokens, {len(shards):,} are used",
                highlight=False,
            )


@contextmanager
def serving(
    job: Job, run: RunFolder, children: Children, stages: Stages, standing: Standing | None = None
) -> Iterator[Servers]:
    """The student's engines and the replicas of every teacher, by name (student, student-2, TEACHER.NUMBER), while the
    block lasts.
    """
    settings = job.recipe.student
    students = student_specs(settings)
    teachers = {**job.fleet.teachers, **(job.references.teachers if job.references else {})}
    fleet = job.fleet.model_copy(update={"teachers": teachers})
    anew = serve_fleet(fleet, children, run.logs, stages, elsewhere=job.elsewhere, also=students, host=job.host)
    with standing.serve(fleet, students) if standing else anew as servers:
        try:
            endpoint.save(run.endpoints, servers.values())
            if standing and settings.sync == "file":
                give(run, settings.model, UNTRAINED)
            yield servers
        finally:
            run.endpoints.unlink(missing_ok=True)


def prove(job: Job, servers: Servers, run: RunFolder, stages: Stages) -> list[Check]:
    """Preflight: what each replica of each teacher shows of itself; it is kept in the run folder.

    Raises:
        UserError: the student's engine ended, with the last lines of its log; or no row of a source can be read.
    """
    max_tokens, encoder = job.recipe.rollout.max_tokens, Encoder(job.recipe.student.model)
    students, endpoints = endpoint.load_by_role(run.endpoints)

    objective = job.recipe.algorithm.objective

    async def ask() -> list[Check]:
        kinds = look(job.sources, encoder)
        responses = await answers(students[0], encoder, kinds, max_tokens=max_tokens)
        checks: list[Check] = []
        for fleet in (job.fleet, job.references):
            if fleet is not None:
                checks += await preflight(
                    fleet,
                    load_tasks(),
                    endpoints,
                    encoder,
                    kinds,
                    max_tokens=max_tokens,
                    top_k=objective.top_k if isinstance(objective, Dense) else 0,
                    responses=responses,
                    done=lambda endpoint: stage.advance(),
                )
        return checks

    with stages.stage("preflight") as stage:
        stage.total(sum(map(len, endpoints.values())))
        try:
            checks = asyncio.run(ask())
        except EngineError as error:
            servers.check()
            raise UserError(f"{error} ({servers.log('student')})") from error
        save(checks, run.preflight)
        stage.outcome = summary(checks, endpoints)
    return checks


def prove_alone(recipe: Recipe, out: Path, console: Console, endpoints: Sequence[Path] = ()) -> list[Check]:
    """`mmopd doctor RECIPE`: prepare, serve all that the recipe names, and prove the teachers; nothing is trained.

    Args:
        out: where logs and findings go.
        endpoints: as in `launch`.

    Raises:
        UserError: as `prepare`, `check`, `serving` and `prove`.
    """
    run = RunFolder(out)
    run.logs.mkdir(parents=True, exist_ok=True)
    with Stages(console) as stages, Children() as children:
        prepare(recipe, stages)
        job = check(recipe, endpoints)
        with serving(job, run, children, stages) as servers:
            return prove(job, servers, run, stages)


def measure_difficulty(job: Job, servers: Servers, run: RunFolder, stages: Stages) -> None:
    """Offline balancing: the untrained student answers every prompt; counts, weights and the picture go to the run
    folder.

    Raises:
        UserError: the engine ended; with the last lines of its log.
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
    """For SFT: the teachers answer every prompt, and what is right is kept beside the shards.

    Raises:
        UserError: a teacher's server ended, with the last lines of its log; or no answer is right.
    """
    if not isinstance(job.recipe.algorithm.objective, SFT):
        return
    _, teachers = endpoint.load_by_role(run.endpoints)
    with stages.stage("answers") as stage, answering(servers, run.logs, "a teacher did not answer: "):
        run_answers(job.recipe, job.sources, teachers, stage)


def difficulty_alone(recipe: Recipe, out: Path, console: Console) -> None:
    """`mmopd difficulty`: prepare, serve the student, measure, and print what was found; nothing is trained.

    Raises:
        UserError: as `prepare`, `check` and `run_pass`, or the engine ended.
    """
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
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
    console.print(f"Before and after: {out / difficulty_counts.PICTURE}", highlight=False, markup=False)


def starting_points(job: Job, servers: Mapping[str, Endpoint]) -> list[Candidate]:
    """The student before training, and the first replica of each teacher."""
    unknown = {endpoint.teacher for endpoint in job.elsewhere} | {
        name for name, t in job.fleet.teachers.items() if t.adapter
    }
    teachers = [
        Candidate(name, "teacher", servers[f"{name}.0"], None if name in unknown else teacher.model)
        for name, teacher in job.fleet.teachers.items()
    ]
    return [Candidate("base", "base", servers["student"], job.recipe.student.model), *teachers]


def distilled(servers: Servers, run: RunFolder) -> Candidate:
    """What the student's engine holds after training; an engine that was started again on the way holds something else."""
    student = servers["student"]

    def objection() -> str:
        with FileSync([student]) as link:
            try:
                lost = link.versions() == [FRESH]
            except SyncError:
                lost = True
        again = f"`mmopd train --resume {run.root}` measures again"
        return f"the student's engine died meanwhile ({servers.log('student')}); {again}" if lost else ""

    return Candidate("distilled", "distilled", student, run.export, objection)


def distil(job: Job, run: RunFolder, children: Children, servers: Servers, stages: Stages) -> None:
    """Start the ranks and follow them to their end; SIGTERM lets them end their step and save it.

    Raises:
        UserError: a rank or a server ended early, with the last lines of its log; or a step that was to be the last
            takes too long.
        SystemExit: the ranks have stopped before their last step, as they were asked to; status 0.
    """
    ranks, timeout = job.recipe.train.ranks, job.recipe.train.timeout
    with stages.stage("distil") as stage, asked_to_stop() as asked:
        what = ["mmopd.train.rank", str(run.root), *job.changed]
        run.stop.unlink(missing_ok=True)
        running = start_ranks(what, ranks, run.logs, children, launcher=job.launcher, host=job.host)
        stage.total(job.recipe.train.steps)
        stage.note("starting the ranks")
        until, done, alive = math.inf, 0, True
        pulses = Pulses(running, timeout)
        while alive:
            time.sleep(0.5)
            alive = any(rank.alive for rank in running)  # first, so that what they leave behind is seen
            check_ranks(running, timeout, stopping=asked.is_set() and not job.launcher)
            pulses.check()
            servers.check()
            if asked.is_set() and until == math.inf:
                until = time.monotonic() + timeout
                stages.console.print("asked to stop: behind this step, with a checkpoint", highlight=False)
                if job.launcher:
                    run.stop.touch()  # a launcher that is told to end may end its ranks at once (deepspeed's does)
                else:
                    for rank in running:
                        rank.terminate()
            if time.monotonic() > until:
                raise UserError(
                    f"the ranks have not ended their step within train.timeout = {timeout} s; the last checkpoint is as it was"
                )
            if (latest := last_metrics(run.metrics)) is not None:
                done = int(latest["step"]) + 1
                stage.total(job.recipe.train.steps, done=done)
                stage.note(one_line(latest))
        if asked.is_set() or done < job.recipe.train.steps:
            how = f"stopped after {done} steps, as asked; `mmopd train --resume {run.root}` goes on from there"
            stages.console.print(how, highlight=False, markup=False, soft_wrap=True)
            raise SystemExit(0)
        again = "".join(f", {name} started again {times} x" for name, times in servers.restarts.items())
        stage.outcome = f"{job.recipe.train.steps} steps on {ranks} rank{'s' * (ranks > 1)}{again}"


def extrapolate(job: Job, run: RunFolder, children: Children, servers: Servers, stages: Stages) -> None:
    """ExPO, in the place of `distil`: merge the teachers into the export folder, and give the engine its weights.

    Raises:
        UserError: a teacher's weights are not on this machine, or not of the student's architecture.
    """
    if elsewhere := [
        name for name, teacher in job.fleet.teachers.items() if teacher.model is None or teacher.adapter is not None
    ]:
        raise UserError(
            f"teacher {elsewhere[0]!r}: expo merges whole weights, so that every teacher needs a `model` here and no adapter"
        )
    objective = job.recipe.algorithm.objective
    assert isinstance(objective, ExPO)
    with stages.stage("merge") as stage:
        weights = {
            teacher.model: teacher.weight for teacher in job.fleet.teachers.values() if teacher.model is not None
        }
        if not run.export.exists():
            merge(job.recipe.student.model, weights, objective.alpha, run.export, stage)
        give(run, run.export, MERGED)
        stage.outcome = f"{len(weights)} teachers, alpha {objective.alpha:g}"


def give(run: RunFolder, model: Path, version: str) -> None:
    """Send the weights of a folder to the student's engines.

    Raises:
        UserError: they do not take them.
    """
    students, _ = endpoint.load_by_role(run.endpoints)
    try:
        with Checkpoint(model) as checkpoint, FileSync(students) as link:
            link.send(((name, checkpoint.tensor(name)) for name in sorted(checkpoint.names)), version)
    except SyncError as error:
        raise UserError(f"the student's engine does not take the weights of {model}: {error}") from error


def finish(run: RunFolder, rows: Sequence[Row], stages: Stages) -> None:
    """Results table, report, and the model's card.

    Raises:
        UserError: a benchmark has no score; everything is written all the same.
    """
    results = Results.of(rows)
    results.write(run.root)
    with stages.stage("report") as stage:
        write_report(run.root)
        (run.export / CARD).write_text(model_card(run, run.recipe()))
        stage.outcome = str(run.report)
    print_results(results, stages.console)
    stages.console.print(f"The model: {run.export}\nThe report: {run.report}", highlight=False, markup=False)
    check_results(results)
