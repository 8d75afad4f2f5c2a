"""Parts shared by `train`, `doctor` and `difficulty`: open a recipe, start its servers, examine its teachers."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mmopd import catalog
from mmopd.capacity.weights import check_model
from mmopd.commands.merge import Checkpoint
from mmopd.config import Engine, Fleet, Recipe, Suite
from mmopd.errors import CheckpointError, ServerError
from mmopd.evaluate.run import read_suite
from mmopd.modality import Encoder
from mmopd.preflight.check import Check
from mmopd.preflight.questions import look
from mmopd.preflight.run import answers, preflight, save, summary
from mmopd.prompts.shards import Shards, open_mixture
from mmopd.prompts.tokens import hash_processor
from mmopd.rollout.student_client import EngineError
from mmopd.rollout.sync import FileSync, SyncError
from mmopd.runtime.network import HOST
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.runtime.run_folder import RunFolder
from mmopd.serving import endpoint
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.servers import Servers
from mmopd.serving.specs import student_specs
from mmopd.task.load import load_tasks
from mmopd.teacher.fleet import Standing, from_files, serve_fleet
from mmopd.teacher.router import check_routes, check_tokenizers, load_teachers, references, routed
from mmopd.train.held_out import held_out_sources
from mmopd.train.suite import suite_between_steps

UNTRAINED = "untrained"  # version of the student's weights before training


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe with all files that it refers to, found and checked."""

    recipe: Recipe
    fleet: Fleet  # the teachers that routes lead to; empty if the objective needs none
    references: Fleet | None  # references of the teachers, if the objective has them
    sources: Mapping[str, Shards]
    suite: Suite | None
    elsewhere: Sequence[Endpoint] = ()  # endpoints of teachers that another `mmopd serve` serves
    changed: Sequence[str] = ()  # sources that were added or removed on purpose before a resume
    launcher: Sequence[str] = ()  # a command that starts the ranks; empty: they are started on this machine
    host: str = HOST  # address that servers listen on

    @property
    def engines(self) -> list[Engine]:
        """Settings of the student's engine and of the teachers that are served here."""
        teachers = {**self.fleet.teachers, **(self.references.teachers if self.references else {})}
        there = {endpoint.teacher for endpoint in self.elsewhere}
        served = [
            teacher.engine for name, teacher in teachers.items() if teacher.model is not None and name not in there
        ]
        return [self.recipe.student.engine, *served]


def preparation(recipe: Recipe) -> ModuleType | None:
    """Return the module of the recipe's preparation, if it has one."""
    return None if recipe.prepare is None else catalog.load_module(catalog.find(recipe.prepare, key="prepare"))


def prepare(recipe: Recipe, stages: Stages) -> None:
    """Run the recipe's preparation, if it has one."""
    if (module := preparation(recipe)) is not None:
        with stages.stage("prepare") as stage:
            module.prepare(Path.cwd(), stage)


def check(recipe: Recipe, endpoints: Sequence[Path] = ()) -> Job:
    """Open and check all that the recipe names, before any process is started.

    The models of teachers in `endpoints` need not be on this machine.

    Raises:
        UserError: a file, a model, a shard, a task, a route or a tokenizer is missing or wrong; the message names it.
    """
    whole = load_teachers(recipe.fleet, recipe.algorithm.objective)
    fleet = routed(whole)
    before = references(whole, recipe.algorithm.objective)
    elsewhere = from_files(whole, endpoints)
    there = {endpoint.teacher for endpoint in elsewhere}
    used = {**fleet.teachers, **(before.teachers if before else {})}
    folders = {name: t.model for name, t in used.items() if t.model is not None and name not in there}
    named = {"student.model": recipe.student.model, **{f"teachers.{name}.model": f for name, f in folders.items()}}
    for key, folder in named.items():
        try:
            check_model(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{key}: {error}") from None
    tasks = load_tasks()
    sources = open_mixture(
        catalog.load_mixture(recipe.mixture, key="mixture"), tasks, Path.cwd(), hash_processor(recipe.student.model)
    )
    held_out_sources(recipe, sources)
    suite_between_steps(recipe)
    for one in (fleet, before):
        if one and one.routes:
            check_routes(one, tasks, [pair for shards in sources.values() for pair in shards.kinds])
    check_tokenizers(recipe.student.model, folders)
    suite = read_suite(catalog.find(recipe.suite, key="suite"), Path.cwd()) if recipe.suite is not None else None
    return Job(recipe, fleet, before, sources, suite, elsewhere)


@contextmanager
def serving(
    job: Job, run: RunFolder, children: Children, stages: Stages, standing: Standing | None = None
) -> Iterator[Servers]:
    """Yield the student's engines and the replicas of every teacher, by name (student, student-2, TEACHER.NUMBER).

    They run until the block ends.
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
    """Run the preflight of each replica of each teacher, and save the checks in the run folder.

    Raises:
        ServerError: the student's engine ended; the message has the last lines of its log.
        DataError: no row of a source can be read.
    """
    max_tokens = job.recipe.rollout.max_tokens
    encoder = Encoder(job.recipe.student.model)
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
                    top_k=objective.likeliest(),
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
            raise ServerError(f"{error} ({servers.log('student')})") from error
        save(checks, run.preflight)
        stage.outcome = summary(checks, endpoints)
    return checks


def give(run: RunFolder, model: Path, version: str) -> None:
    """Send the weights of a folder to the student's engines.

    Raises:
        ServerError: an engine does not accept them.
    """
    students, _ = endpoint.load_by_role(run.endpoints)
    try:
        with Checkpoint(model) as checkpoint, FileSync(students) as link:
            link.send(((name, checkpoint.tensor(name)) for name in sorted(checkpoint.names)), version)
    except SyncError as error:
        raise ServerError(f"the student's engine does not accept the weights of {model}: {error}") from error
