"""Budget of a recipe on given GPUs, printed by `mmopd plan`: which process runs on which GPU, and what does not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmopd import catalog
from mmopd.capacity import memory
from mmopd.capacity.memory import GIB, Gpu, Load, Part, ceil_gib
from mmopd.capacity.model_size import Model, read_model
from mmopd.capacity.step_time import Served, Share, Time, Work, step_times
from mmopd.config import Fleet, Mixture, Recipe
from mmopd.errors import ConfigError
from mmopd.serving.placement import place
from mmopd.serving.specs import ServerSpec, student_specs, to_specs
from mmopd.settings_file import suggest
from mmopd.task.base import Task
from mmopd.task.load import load_tasks
from mmopd.teacher.router import find_teachers, load_teachers, references, routed


class Role(NamedTuple):
    """A process on one GPU or on several, the same on each."""

    title: str
    parts: list[Part]
    peak: float
    where: list[tuple[int, int]]  # (node, GPU)
    way_out: str
    idle: float  # the part of its peak that stays in use while the student's engine samples
    sleeps: bool = False  # true if it sleeps while the trainer learns


@dataclass(frozen=True, slots=True)
class Machines:
    """Nodes of the same kind."""

    gpu: Gpu
    gpus: int = 8  # GPUs of a node
    nodes: int = 1


@dataclass(frozen=True, slots=True)
class Budget:
    """Result of `mmopd plan`."""

    machines: Machines
    roles: list[Role]
    times: list[Time]
    steps: int
    ahead: bool  # rollouts run in parallel with the update of the previous step
    elsewhere: list[str]  # teachers that use no GPU of these machines
    refusals: list[str]

    @property
    def step(self) -> float:
        """Seconds of a step.

        Teachers score while the student samples. The update runs after that, or in parallel with it (`ahead`). Then the
        weights are sent.
        """
        seconds = {time.what: time.seconds for time in self.times}
        rolled = max(seconds["rollout"], seconds["scoring"])
        learnt = seconds["update"]
        return (max(rolled, learnt) if self.ahead else rolled + learnt) + seconds["weight sync"]


def budget(recipe: Recipe, machines: Machines, *, response: int | None = None, elsewhere: bool = False) -> Budget:
    """Estimate the memory and the time of a recipe.

    Args:
        recipe: the recipe.
        machines: the machines to run on.
        response: mean tokens of a response; default: half of rollout.max_tokens.
        elsewhere: true if the teachers run on other machines, started by `mmopd serve`.

    Raises:
        CheckpointError: a config.json is missing or wrong.
        ConfigError: a file of the catalogue is missing or wrong, or the recipe trains nothing.
    """
    objective = recipe.algorithm.objective
    if not objective.trains:
        raise ConfigError(f"algorithm.objective: {objective.kind} merges weights on the CPU; there is nothing to plan")
    whole = load_teachers(recipe.fleet, objective)
    mixture = catalog.load_mixture(recipe.mixture, key="mixture")
    tasks = load_tasks()
    before = references(whole, objective)
    teachers = {**routed(whole).teachers, **(before.teachers if before else {})}
    fleet = whole.model_copy(update={"teachers": teachers})
    student = read_model(recipe.student.model, recipe.train)
    servers = _servers(recipe, fleet, student, machines.gpus, elsewhere)
    load = largest(recipe, mixture, tasks, servers)
    slots = memory.ranks_by_node(recipe.train.ranks, machines.gpus, machines.nodes)
    roles = [_trainer(recipe, student, load, slots), *(_server(server, machines.gpu) for server in servers)]
    roles[1] = roles[1]._replace(sleeps=recipe.student.sync == "ipc")
    refusals = [
        *_too_many(recipe, machines, slots),
        *_too_long(recipe, servers, load),
        *_too_small(servers, machines.gpu),
    ]
    refusals += _overfull(roles, machines)
    shares = _shares(fleet, before, mixture, tasks)
    work = Work(
        recipe.rollout.prompts,
        recipe.rollout.group,
        max(1, load.prompt // 2),
        response or max(1, load.response // 2),
        load,
    )
    times = step_times(recipe, machines.gpu, servers, work, shares)
    refusals += _too_slow(recipe, times)
    away = [name for name, teacher in teachers.items() if elsewhere or teacher.model is None]
    return Budget(machines, roles, times, recipe.train.steps, recipe.rollout.async_steps > 0, away, refusals)


def largest(recipe: Recipe, mixture: Mixture, tasks: Mapping[str, Task], servers: Sequence[Served]) -> Load:
    """Return the largest sample that the limits of the mixture allow.

    A source without a limit uses the contexts of the servers.

    Raises:
        ConfigError: a source has an unknown task.
    """
    free = min(server.engine.max_model_len - server.scores for server in servers) - recipe.rollout.max_tokens
    tower = servers[0].model.vision
    prompts = [0]
    pictures = [0]
    for source in mixture.sources.values():
        if source.task not in tasks:
            raise ConfigError(f"no task {source.task!r} in modalities/{suggest(source.task, tasks)}")
        prompts.append(source.max_prompt_tokens or max(0, free))
        pictures.append(prompts[-1] if tasks[source.task].modality != "text" else 0)
    patches = max(pictures) * tower.merge if tower else 0
    return Load(max(prompts), recipe.rollout.max_tokens, patches > 0, patches)


def _servers(recipe: Recipe, fleet: Fleet, student: Model, gpus: int, elsewhere: bool) -> list[Served]:
    engines = student_specs(recipe.student)
    specs = to_specs(fleet)
    here = [spec.engine.tensor_parallel for spec in engines] + [
        0 if elsewhere else spec.engine.tensor_parallel for spec in specs
    ]
    where = place(here, gpus, [0] if recipe.student.sync == "ipc" else [])
    models = {spec.model: read_model(spec.model) for spec in specs}
    teachers = [
        Served(
            spec.name, _teachers(spec), f"teachers.{_teachers(spec)[0]}.engine", models[spec.model], spec.engine, places
        )
        for spec, places in zip(specs, where[len(engines) :], strict=True)
    ]
    sampling = [place for places in where[: len(engines)] for place in places]
    return [Served("student", (), "student.engine", student, recipe.student.engine, sampling, len(engines)), *teachers]


def _teachers(spec: ServerSpec) -> tuple[str, ...]:
    """Return the teachers that have an endpoint (TEACHER.NUMBER) on a server."""
    return tuple(name.rpartition(".")[0] for name in spec.served)


def _trainer(recipe: Recipe, student: Model, load: Load, slots: Sequence[int]) -> Role:
    train = recipe.train
    parts = memory.trainer(student, recipe, train.ranks, load)
    step = memory.step_memory(student, train, train.ranks)
    above = max(parts[-2:], key=lambda part: part.size)
    if not train.gradient_checkpointing:
        way_out = "set train.gradient_checkpointing=true"
    elif sum(part.size for part in parts[:-2]) > above.size:
        way_out = f"raise train.ranks (now {train.ranks}), or set train.offload=true"
    elif train.micro_tokens > load.tokens or train.micro_patches > load.patches > 0:
        way_out = (
            f"lower train.micro_tokens (now {train.micro_tokens:,}) or train.micro_patches ({train.micro_patches:,})"
        )
    else:
        way_out = f"lower rollout.max_tokens (now {load.response:,}): one response is a micro-batch"
    where = [(node, gpu) for node, n in enumerate(slots) for gpu in range(n)]
    shown = [*parts, Part("optimiser's step", step, "float32 gradient and denominator, when activations are gone")]
    idle = sum(part.size for part in parts[:-2])
    return Role(f"Trainer, on each of {train.ranks} ranks", shown, memory.peak(parts, step), where, way_out, idle)


def _server(server: Served, gpu: Gpu) -> Role:
    parts = memory.server(server.model, server.engine, gpu, scores=server.scores)
    peak = sum(part.size for part in parts)
    engine = server.engine
    more = (
        f", or --max-num-batched-tokens (now {memory.batched_tokens(engine, gpu):,}) in its extra_args"
        if server.scores
        else ""
    )
    setting = (
        f"kv_cache_mib (now {engine.kv_cache_mib:,})"
        if engine.kv_cache_mib
        else f"gpu_share (now {engine.gpu_share:g})"
    )
    title = "Engine of the student" if not server.scores else f"Teacher {server.name}"
    title += f", {server.replicas} replicas" if server.replicas > 1 else ""
    title += f", on each of {n} GPUs" if (n := server.replicas * engine.tensor_parallel) > 1 else ""
    where = [(0, place) for place in server.gpus]
    return Role(
        title + ("" if where else " (elsewhere)"), parts, peak, where, f"lower {setting} of {server.key}{more}", peak
    )


def _too_many(recipe: Recipe, machines: Machines, slots: Sequence[int]) -> list[str]:
    """Return a message if there are more ranks than GPUs."""
    over = max(slots) - machines.gpus
    has = f"{machines.nodes} x {machines.gpus} GPUs"
    return [
        f"train.ranks is {recipe.train.ranks}, but there are only {has}: {over} too many; lower train.ranks or add "
        "nodes"
    ] * (over > 0)


def _too_long(recipe: Recipe, servers: Sequence[Served], load: Load) -> list[str]:
    """Return messages for contexts that are too short for the longest prompt and response.

    A teacher needs room for one more token.
    """
    found = []
    for server in servers:
        need = max(1, load.prompt) + load.response + server.scores
        has = server.engine.max_model_len
        if need > has:
            found.append(
                f"{server.name}: a prompt of {load.prompt:,} and a response of {load.response:,} tokens need "
                f"{need:,} tokens, but max_model_len is {has:,}: {need - has:,} short; raise it ({server.key}), or "
                "lower rollout.max_tokens"
            )
    return found


def _too_small(servers: Sequence[Served], gpu: Gpu) -> list[str]:
    """Return messages for servers that vLLM would not start: heads that do not split, or no room for one sequence."""
    found = []
    for server in servers:
        engine = server.engine
        heads = server.model.text.heads
        if heads % engine.tensor_parallel:
            found.append(
                f"{server.name}: {heads} heads do not split over tensor_parallel={engine.tensor_parallel} "
                f"({server.key})"
            )
        short = memory.short_of_kv(server.model, engine, gpu)
        if short > 0:
            found.append(
                f"{server.name}: the KV cache is {ceil_gib(short):.1f} GiB too small for one sequence of "
                f"max_model_len={engine.max_model_len:,}; "
                f"raise tensor_parallel (now {engine.tensor_parallel}), or lower max_model_len ({server.key})"
            )
    return found


def _too_slow(recipe: Recipe, times: Sequence[Time]) -> list[str]:
    """Return a message if an engine does not have enough time for the rollouts."""
    rollout = next(time.seconds for time in times if time.what == "rollout")
    limit = f"train.timeout = {recipe.train.timeout:,} s is the limit for an engine's answers: "
    limit += "raise it, or student.replicas"
    return [f"rollouts take {rollout:,.0f} s by this estimate, but {limit}"] * (rollout > recipe.train.timeout)


def _overfull(roles: Sequence[Role], machines: Machines) -> list[str]:
    """Return messages for GPUs that need more memory than they have; one message for the same set of roles."""
    found: dict[str, None] = {}
    memory = machines.gpu.memory * GIB
    for node, gpu in sorted({at for role in roles for at in role.where}):
        there = [role for role in roles if (node, gpu) in role.where]
        over = max(sum(role.idle for role in there), sum(role.peak for role in there if not role.sleeps)) - memory
        if over > 0:
            what = " + ".join(f"{role.title.partition(',')[0]} {role.peak / GIB:.1f} GiB" for role in there)
            way_out = "; or ".join(role.way_out for role in there) + ("; or take more GPUs" if len(there) > 1 else "")
            found[f"{what}: {ceil_gib(over):.1f} GiB more than {machines.gpu.memory:g} GiB; {way_out}"] = None
    elsewhere = [role for role in roles if not role.where and role.peak > memory]
    for role in elsewhere:
        found[
            f"{role.title} {role.peak / GIB:.1f} GiB: {ceil_gib(role.peak - memory):.1f} GiB too much; {role.way_out}"
        ] = None
    return list(found)


def _shares(fleet: Fleet, before: Fleet | None, mixture: Mixture, tasks: Mapping[str, Task]) -> dict[str, Share]:
    """Return the shares of the responses that each teacher scores."""
    total = sum(source.weight for source in mixture.sources.values()) or 1.0
    shares = dict.fromkeys(fleet.teachers, Share(0.0, 0.0))
    for one in (fleet, before):
        if one is None or not one.routes:
            continue
        for source in mixture.sources.values():
            modality = tasks[source.task].modality
            share = source.weight / total
            for routed_to in find_teachers(one, tasks, source.task, modality):
                known = shares[routed_to.name]
                sees = modality != "text" and routed_to.view.images != "drop"
                shares[routed_to.name] = Share(known.all + share, known.seen + share * sees)
    return shares
