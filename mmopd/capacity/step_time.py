"""Time of a step, computed from published rates of a GPU and assumed shares of them. Not measured on a GPU.

Decoding is limited by memory bandwidth, scoring and the update by FLOP/s. Teachers score while the student samples.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mmopd.capacity import memory
from mmopd.capacity.memory import GIB, Gpu, Load
from mmopd.capacity.model_size import Model
from mmopd.config import Engine, Recipe

# Assumptions: shares of the published rates that are reached.
DECODE = 0.6  # of the memory bandwidth, for an engine that samples
PREFILL = 0.4  # of the FLOP/s, for a teacher that scores
UPDATE = 0.35  # of the FLOP/s, for the trainer with ZeRO-3
HOST = 5e9  # B/s for weights between a GPU and the memory of the machine
PEER = 20e9  # B/s for weights from GPU to GPU; the rate of PCIe, NVLink is faster
ALL_REDUCE = 20e-6  # s for an all-reduce; an engine on several GPUs needs two in each layer and pass


class Served(NamedTuple):
    """A vLLM server of teachers, or all engines of the student."""

    name: str
    teachers: tuple[str, ...]  # several teachers with adapters may share a server; empty for the student
    key: str  # key of its engine settings
    model: Model
    engine: Engine
    gpus: list[int]  # GPUs of the first node; empty if it runs elsewhere, on other GPUs
    replicas: int = 1  # number of the student's engines

    @property
    def scores(self) -> bool:
        """True for a teacher's server."""
        return bool(self.teachers)


class Share(NamedTuple):
    """Shares of the responses of a step that a teacher scores."""

    all: float
    seen: float  # share of responses to prompts with images


class Work(NamedTuple):
    """Tokens of a step."""

    prompts: int
    group: int  # responses to a prompt
    prompt: int  # mean tokens of a prompt
    response: int  # mean tokens of a response
    load: Load  # the longest sample

    @property
    def responses(self) -> int:
        """Responses to all prompts."""
        return self.prompts * self.group

    @property
    def tokens(self) -> int:
        """Tokens of all samples, prompts included."""
        return self.responses * self.context

    @property
    def context(self) -> int:
        """Mean tokens of a sample."""
        return self.prompt + self.response


class Time(NamedTuple):
    """A part of a step."""

    what: str
    seconds: float
    how: str


def step_times(
    recipe: Recipe, gpu: Gpu, servers: Sequence[Served], work: Work, shares: Mapping[str, Share]
) -> list[Time]:
    """Return the times of rollout, scoring, update and weight sync.

    Args:
        recipe: the recipe.
        gpu: kind of GPU.
        servers: the student's engines first.
        work: tokens of a step.
        shares: of each teacher.
    """
    student = servers[0].model
    return [
        _rollout(recipe, gpu, student, work),
        _scoring(gpu, servers[1:], work, shares),
        _update(recipe, gpu, student, work),
        _sync(recipe, gpu, student),
    ]


def flops(model: Model, tokens: float, context: float, passes: int) -> float:
    """Return the FLOP of the language model for tokens that see half of `context` on average.

    A forward pass counts as 1, a backward pass as 2, a recomputed forward pass as 1.
    """
    text = model.text
    return passes * tokens * (2 * model.active + 2 * text.caching * text.query * context)


def tower(model: Model, tokens: float, passes: int) -> float:
    """Return the FLOP of the vision tower, if there is one, for visual tokens; each is made of some patches."""
    return 2 * passes * model.tower * tokens * model.vision.merge if model.vision else 0.0


def _rollout(recipe: Recipe, gpu: Gpu, student: Model, work: Work) -> Time:
    """Return the time of the rollouts.

    Each token reads the weights and the cache of an engine's sequences. The longest response alone is a lower bound.
    """
    if not recipe.algorithm.objective.samples_rollouts:
        return Time("rollout", 0.0, "none: the teachers' answers are sampled before training")
    engine = recipe.student.engine
    rollout = recipe.rollout
    per_token = memory.kv_bytes(student, engine)
    room = memory.kv_tokens(memory.server(student, engine, gpu, scores=False), per_token)
    context = work.prompt + work.response // 2
    replicas = recipe.student.replicas
    asked = min(work.responses, rollout.concurrency * recipe.train.ranks * rollout.group)
    at_once = max(1, min(asked // replicas, engine.max_num_seqs, room // context))
    rate = gpu.bandwidth * 1e9 * DECODE
    split = engine.tensor_parallel
    weights = student.read * memory.WIDTH[engine.dtype] / split
    multiplied = 2 * student.active * at_once / (split * gpu.tflops * 1e12 * PREFILL)
    reduced = 2 * student.text.layers * ALL_REDUCE if split > 1 else 0.0
    each = max((weights + at_once * context * per_token) / rate, multiplied) + reduced
    everywhere = replicas * at_once
    seconds = max(work.responses * work.response / everywhere * each, work.load.response * (weights / rate + reduced))
    how = f"{work.responses:,} x {work.response:,} tokens, {everywhere} in parallel: {everywhere / each:,.0f} tokens/s"
    return Time("rollout", seconds, how)


def _scoring(gpu: Gpu, servers: Sequence[Served], work: Work, shares: Mapping[str, Share]) -> Time:
    """Return the time of prefill for the busiest teacher; teachers that share a server count as if each had it alone.

    Images pass through the vision tower once for each response: that vLLM may have them in its cache is ignored.
    """
    rates: dict[str, float] = defaultdict(float)
    models: dict[str, Model] = {}
    for server in servers:
        for name in server.teachers:
            rates[name] += server.engine.tensor_parallel * gpu.tflops * 1e12 * PREFILL
            models[name] = server.model
    seconds = {}
    for name, model in models.items():
        looked = tower(model, work.responses * work.prompt * shares[name].seen, 1) if work.load.images else 0.0
        seconds[name] = (flops(model, work.tokens * shares[name].all, work.context, 1) + looked) / rates[name]
    if not seconds:
        return Time("scoring", 0.0, "no teacher is served by mmopd")
    slowest = max(seconds, key=lambda name: seconds[name])
    return Time(
        "scoring",
        seconds[slowest],
        f"{slowest}: prefill of {shares[slowest].all:.0%} of the responses, during the rollout",
    )


def _update(recipe: Recipe, gpu: Gpu, student: Model, work: Work) -> Time:
    """Return the time of the update.

    It consists of forward and backward pass over all responses, another forward pass with checkpointing, and another
    one for recomputed log-probs. A prompt is computed once for its group, unless layers have a state along the row
    (linear attention).
    """
    passes = 3 + recipe.train.gradient_checkpointing + recipe.recomputes
    prompts = work.prompts if student.text.caching == student.text.layers else work.responses
    asked = prompts * work.prompt
    answered = work.responses * work.response
    total = flops(student, asked, work.prompt, passes) + flops(
        student, answered, 2 * work.prompt + work.response, passes
    )
    if work.load.images:
        total += tower(student, asked, passes)
    seconds = total / (recipe.train.ranks * gpu.tflops * 1e12 * UPDATE)
    return Time(
        "update", seconds, f"{2 * passes} FLOP per parameter and token, {(asked + answered) / 1e6:.1f} M tokens"
    )


def _sync(recipe: Recipe, gpu: Gpu, student: Model) -> Time:
    """Return the time in which rank 0 gathers the changed weights and sends them to the engines.

    An engine that sleeps moves all its weights to the host and back.
    """
    moved = student.sent * memory.WIDTH[recipe.train.dtype]
    gathered = moved / PEER
    size = f"{moved / GIB:.1f} GiB"
    sync = recipe.student.sync
    if sync == "file":
        return Time("weight sync", gathered + 2 * moved / HOST, f"{size} through the memory of the machine")
    if sync == "broadcast":
        replicas = recipe.student.replicas
        return Time(
            "weight sync",
            gathered + replicas * moved / PEER,
            f"{size} from GPU to GPU" + f", to {replicas} engines" * (replicas > 1),
        )
    asleep = student.parameters * memory.WIDTH[recipe.student.engine.dtype]
    how = f"{size} within a GPU, and the sleeping engine's {asleep / GIB:.1f} GiB to the host and back"
    return Time("weight sync", gathered + 2 * moved / (gpu.bandwidth * 1e9) + 2 * asleep / HOST, how)
