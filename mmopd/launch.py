"""`mmopd train`: the stages of a run in order, on this machine. `launch` is the summary; each stage is a function below it."""

import asyncio
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmopd import catalog, config
from mmopd.config import Fleet, Recipe, Suite
from mmopd.doctor import Check
from mmopd.errors import UserError
from mmopd.evaluate.lmms import Record, evaluate, read_suite
from mmopd.evaluate.table import Kind, Results, Row
from mmopd.fingerprint import hash_model
from mmopd.modality import Encoder
from mmopd.processes import Children
from mmopd.progress import Stages
from mmopd.prompts import difficulty
from mmopd.prompts.shards import Shards, open_mixture
from mmopd.prompts.tokens import hash_processor
from mmopd.report.html import write_report
from mmopd.rollout.difficulty import run_pass
from mmopd.rollout.engine import EngineError
from mmopd.run import RunFolder
from mmopd.teacher.endpoint import Endpoint
from mmopd.teacher.fleet import from_files, serve_fleet, serve_in_stage
from mmopd.teacher.preflight import answers, insist, preflight, save, summary
from mmopd.teacher.probes import look
from mmopd.teacher.router import check_routes, check_tokenizers
from mmopd.teacher.serve import Servers, ServerSpec
from mmopd.train.distributed import free_port

CACHE = Path(".mmopd")  # of the workspace: what several runs share


@dataclass(frozen=True, slots=True)
class Job:
    """Everything that a recipe refers to, found and checked."""

    recipe: Recipe
    fleet: Fleet
    sources: Mapping[str, Shards]
    suite: Suite | None
    elsewhere: Sequence[Endpoint] = ()  # of teachers that another `mmopd serve` serves
    changed: Sequence[str] = ()  # sources that were added or removed on purpose before a resume


def launch(run: RunFolder, recipe: Recipe, console: Console, *, endpoints: Sequence[Path] = (), changed: Sequence[str] = ()) -> None:
    """Prepare, serve, prove the teachers, measure difficulty, evaluate, distil, evaluate, report.

    Args:
        endpoints: files of `mmopd serve`; the teachers in them are used from there.
        changed: sources that were added to the mixture or removed from it on purpose, before a resume.

    Raises:
        UserError: anything that a user can put right; whatever was started is stopped, what was measured is kept.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which transformers imports, would warn that it found nothing else
    with Stages(console, run.timings) as stages:
        prepare(recipe, stages)
        job = dataclasses.replace(check(recipe, endpoints), changed=changed)
        say_left_out(job, console)
        with Children() as children, serving(job, run, children, stages) as servers:
            insist(prove(job, servers, run, stages), console)
            measure_difficulty(job, servers, run, stages)
            rows = evaluate_all(job.suite, starting_points(job, servers), run.evaluation, stages)
            distil(job, run, children, servers, stages)
            rows += evaluate_all(job.suite, [Candidate("distilled", "distilled", servers["student"], run.export)], run.evaluation, stages)
        finish(run, rows, stages)


def prepare(recipe: Recipe, stages: Stages) -> None:
    """Run the recipe's own preparation, if it has one."""
    if recipe.prepare is not None:
        path = catalog.find(recipe.prepare)
        with stages.stage("prepare") as stage:
            catalog.load_module(path).prepare(Path.cwd(), stage)


def check(recipe: Recipe, endpoints: Sequence[Path] = ()) -> Job:
    """Open all that the recipe names, before anything is started; the models of teachers in `endpoints` need not be on this machine.

    Raises:
        UserError: a file, a model, a shard, a task, a route or a tokenizer is missing or wrong; names it.
    """
    fleet = catalog.load_fleet(recipe.fleet)
    elsewhere = from_files(fleet, endpoints)
    there = {endpoint.teacher for endpoint in elsewhere}
    folders = {name: t.model for name, t in fleet.teachers.items() if t.model is not None and name not in there}
    for name, folder in {"student": recipe.student.model, **folders}.items():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: no model in this folder (of {name}); it needs a config.json and weights in safetensors")
    tasks = catalog.load_tasks()
    sources = open_mixture(catalog.load_mixture(recipe.mixture), tasks, Path.cwd(), hash_processor(recipe.student.model))
    check_routes(fleet, tasks, [pair for shards in sources.values() for pair in shards.kinds])
    check_tokenizers(recipe.student.model, folders)
    suite = read_suite(catalog.find(recipe.suite), Path.cwd()) if recipe.suite is not None else None
    return Job(recipe, fleet, sources, suite, elsewhere)


def say_left_out(job: Job, console: Console) -> None:
    """Name the sources of which rows are left out, and how many."""
    for name, shards in job.sources.items():
        if shards.left_out:
            console.print(
                f"source {name}: {shards.left_out:,} rows are left out by max_prompt_tokens, {len(shards):,} are used", highlight=False
            )


@contextmanager
def serving(job: Job, run: RunFolder, children: Children, stages: Stages) -> Iterator[Servers]:
    """The student's engine and the replicas of every teacher, by name (student, TEACHER.NUMBER), while the block lasts."""
    student = ServerSpec("student", job.recipe.student.model, job.recipe.student.engine, updatable=True)
    with serve_fleet(job.fleet, children, run.logs, stages, elsewhere=job.elsewhere, also=[student]) as servers:
        run.write_endpoints(servers)
        try:
            yield servers
        finally:
            run.endpoints.unlink(missing_ok=True)


def prove(job: Job, servers: Servers, run: RunFolder, stages: Stages) -> list[Check]:
    """Preflight: what each replica of each teacher shows of itself; it is kept in the run folder.

    Raises:
        UserError: the student's engine ended, with the last lines of its log; or no row of a source can be read.
    """
    max_tokens, encoder = job.recipe.rollout.max_tokens, Encoder(job.recipe.student.model)
    student, endpoints = run.read_endpoints()

    async def ask() -> list[Check]:
        kinds = look(job.sources, encoder)
        responses = await answers(student, encoder, kinds, max_tokens=max_tokens)
        return await preflight(
            job.fleet,
            catalog.load_tasks(),
            endpoints,
            encoder,
            kinds,
            max_tokens=max_tokens,
            responses=responses,
            done=lambda endpoint: stage.advance(),
        )

    with stages.stage("preflight") as stage:
        stage.total(sum(map(len, endpoints.values())))
        try:
            checks = asyncio.run(ask())
        except EngineError as error:
            servers.check()
            raise UserError(f"{error} ({run.logs / 'student.log'})") from error
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
    """Offline balancing: the untrained student answers every prompt; counts, weights and the picture go to the run folder.

    Raises:
        UserError: the engine ended; with the last lines of its log.
    """
    if job.recipe.algorithm.difficulty is None:
        return
    if (run.difficulty / difficulty.FILE).is_file() and difficulty.load(run.difficulty / difficulty.FILE).keys() == job.sources.keys():
        return
    with stages.stage("difficulty") as stage:
        try:
            run_pass(job.recipe, job.sources, servers["student"], run.difficulty, stage)
        except EngineError as error:
            servers.check()
            raise UserError(f"{error} ({run.logs / 'student.log'})") from error


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
        spec = ServerSpec("student", recipe.student.model, recipe.student.engine, updatable=False)
        with serve_in_stage([spec], children, logs, stages) as servers, stages.stage("difficulty") as stage:
            try:
                measured = run_pass(recipe, job.sources, servers["student"], out, stage)
            except EngineError as error:
                servers.check()
                raise UserError(f"{error} ({logs / 'student.log'})") from error
    console.print(difficulty.table(measured))
    console.print(f"Before and after: {out / difficulty.PICTURE}", highlight=False, markup=False)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A served model that is evaluated, one row of the results table."""

    name: str
    kind: Kind
    endpoint: Endpoint
    model: Path | None  # the folder with exactly its weights; None if it runs elsewhere, or has an adapter


def starting_points(job: Job, servers: Mapping[str, Endpoint]) -> list[Candidate]:
    """The student before training, and the first replica of each teacher."""
    unknown = {endpoint.teacher for endpoint in job.elsewhere} | {name for name, t in job.fleet.teachers.items() if t.adapter}
    teachers = [
        Candidate(name, "teacher", servers[f"{name}.0"], None if name in unknown else teacher.model)
        for name, teacher in job.fleet.teachers.items()
    ]
    return [Candidate("base", "base", servers["student"], job.recipe.student.model), *teachers]


def evaluate_all(suite: Suite | None, candidates: Sequence[Candidate], out: Path, stages: Stages) -> list[Row]:
    """The suite on each candidate; what was measured with the same weights, data and settings is taken from the cache."""
    if suite is None:
        return []
    rows: list[Row] = []
    with stages.stage(f"evaluate {', '.join(c.name for c in candidates)}") as stage:
        stage.total(len(candidates) * len(suite.benchmarks))

        def show(benchmark: config.Benchmark, record: Record | None) -> None:
            if record is not None:
                stage.advance()
                stage.note(f"{record.endpoint}, {benchmark.column}: {record.reason or f'{record.score:.1f}'}")

        for candidate in candidates:
            endpoint = dataclasses.replace(candidate.endpoint, name=candidate.name)
            weights = hash_model(candidate.model) if candidate.model else ""
            records = evaluate(endpoint, suite, out=out, weights=weights, cache=CACHE / "eval", on_event=show)
            rows.append(Row(candidate.name, candidate.kind, tuple(records)))
        reused = sum(record.reused for row in rows for record in row.records)
        stage.outcome = f"{len(rows) * len(suite.benchmarks) - reused} lmms-eval calls, {reused} results from the cache"
    return rows


def distil(job: Job, run: RunFolder, children: Children, servers: Servers, stages: Stages) -> None:
    """Start the ranks and follow them to their end.

    Raises:
        UserError: a rank or a server ended early; with the last lines of its log.
    """
    ranks, port = job.recipe.train.ranks, free_port()
    env = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "mmopd.train.rank", str(run.root), *job.changed]
    with stages.stage("distil") as stage:
        running = [
            children.start(f"rank{rank}", command, run.logs / f"rank{rank}.log", env | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]
        stage.total(job.recipe.train.steps)
        stage.note("starting the ranks")
        while any(rank.alive for rank in running):
            if (latest := last_metrics(run.metrics)) is not None:
                stage.total(job.recipe.train.steps, done=int(latest["step"]) + 1)
                stage.note(one_line(latest))
            servers.check()
            time.sleep(0.5)
            failed = next((rank for rank in running if rank.returncode), None)
            if failed is not None:
                raise UserError(f"{failed.name} ended with status {failed.returncode}; the last lines of {failed.log}:\n{failed.tail()}")
        again = "".join(f", {name} started again {times} x" for name, times in servers.restarts.items())
        stage.outcome = f"{job.recipe.train.steps} steps on {ranks} rank{'s' * (ranks > 1)}{again}"


def last_metrics(path: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics file; None while there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            whole, newline, _ = file.read().rpartition(b"\n")
    except FileNotFoundError:
        return None
    last: dict[str, Any] | None = json.loads(whole.rpartition(b"\n")[2]) if newline else None
    return last


def one_line(metrics: Mapping[str, Any]) -> str:
    """What a person wants to see of a step while it runs."""
    accuracy = "  ".join(f"{key.removeprefix('accuracy/')} {value:.2f}" for key, value in metrics.items() if key.startswith("accuracy/"))
    counts = f"kept {metrics['kept']:.0f}  masked {metrics['masked']:.0f}  failed {metrics['absent']:.0f}"
    return f"{metrics['seconds']:.1f} s/step  return {metrics['return']:+.3f}  right: {accuracy}  {counts}"


def finish(run: RunFolder, rows: Sequence[Row], stages: Stages) -> None:
    """Results table and report.

    Raises:
        UserError: a benchmark has no score; everything is written all the same.
    """
    results = Results.of(rows)
    results.write(run.root)
    with stages.stage("report") as stage:
        write_report(run.root)
        stage.outcome = str(run.report)
    print_results(results, stages.console)
    stages.console.print(f"The model: {run.export}\nThe report: {run.report}", highlight=False, markup=False)
    check_results(results)


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
        raise UserError("\n".join(f"{record.column} of {record.endpoint} has no score: {record.reason}" for record in failed))


def evaluate_models(suite: Path, models: Sequence[Path], recipe: Recipe, out: Path, console: Console) -> None:
    """`mmopd eval`: serve one model after the other, and evaluate it.

    Raises:
        UserError: no such folder, or a server does not start.
    """
    resolved = read_suite(catalog.find(suite), Path.cwd())
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
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
