"""How long a step takes, from published rates of a GPU and assumed shares of them. Nothing in here has been measured on a GPU.

Decoding is bound by memory bandwidth, scoring and the update by FLOP/s. Teachers score while the student samples.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mmopd import estimate
from mmopd.config import Engine, Recipe
from mmopd.estimate import GIB, Gpu, Load
from mmopd.sizes import Model

# Assumed: shares of the published rates that are reached.
DECODE = 0.6  # of the memory bandwidth, by an engine that samples
PREFILL = 0.4  # of the FLOP/s, by a teacher that scores
UPDATE = 0.35  # of the FLOP/s, by the trainer under ZeRO-3
HOST = 5e9  # B/s, of weights through the memory of the machine


class Served(NamedTuple):
    """A vLLM server, or the student's several."""

    name: str
    teachers: tuple[str, ...]  # several with adapters may share one; none: it is the student's
    key: str  # of its engine's settings
    model: Model
    engine: Engine
    gpus: list[int]  # of the first node; none: it runs elsewhere, on GPUs of its own
    replicas: int = 1  # of the student's

    @property
    def scores(self) -> bool:
        """Whether it is a teacher's."""
        return bool(self.teachers)


class Work(NamedTuple):
    """The tokens of a step."""

    prompts: int
    group: int  # responses of a prompt
    prompt: int  # mean tokens of a prompt
    response: int  # mean tokens of a response
    load: Load  # the longest

    @property
    def responses(self) -> int:
        """Of all prompts."""
        return self.prompts * self.group

    @property
    def tokens(self) -> int:
        """Of all samples, prompts included."""
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


def step_times(recipe: Recipe, gpu: Gpu, servers: Sequence[Served], work: Work, shares: Mapping[str, float]) -> list[Time]:
    """Rollout, scoring, update and weight sync.

    Args:
        servers: the student's engines first.
        shares: teacher -> share of the responses that it scores.
    """
    student = servers[0].model
    moved = student.numbers * estimate.WIDTH[recipe.train.dtype]
    return [
        _rollout(recipe, gpu, student, work),
        _scoring(gpu, servers[1:], work, shares),
        _update(recipe, gpu, student, work),
        Time("weight sync", 2 * moved / HOST, f"{moved / GIB:.1f} GiB out of the trainer and into the engine"),
    ]


def flops(model: Model, tokens: float, context: float, passes: int) -> float:
    """Of tokens that see half of `context` on average. A forward pass is 1, a backward pass 2, recomputing 1."""
    text = model.text
    return passes * tokens * (2 * model.active + 2 * text.caching * text.query * context)


def _rollout(recipe: Recipe, gpu: Gpu, student: Model, work: Work) -> Time:
    """Each token reads the weights and the cache of an engine's sequences; the longest response alone is a bound of its own."""
    if recipe.algorithm.objective.kind == "sft":
        return Time("rollout", 0.0, "none: the teachers' answers are sampled before training")
    engine, rollout = recipe.student.engine, recipe.rollout
    per_token = estimate.kv_bytes(student, engine)
    room = estimate.kv_tokens(estimate.server(student, engine, gpu, scores=False), per_token)
    context = work.prompt + work.response // 2
    replicas = recipe.student.replicas
    asked = min(work.responses, rollout.concurrency * recipe.train.ranks * rollout.group)
    at_once = max(1, min(asked // replicas, engine.max_num_seqs, room // context))
    rate, split = gpu.bandwidth * 1e9 * DECODE, engine.tensor_parallel
    weights = student.read * estimate.WIDTH[engine.dtype] / split
    multiplied = 2 * student.active * at_once / (split * gpu.tflops * 1e12 * PREFILL)
    each = max((weights + at_once * context * per_token) / rate, multiplied)
    everywhere = replicas * at_once
    seconds = max(work.responses * work.response / everywhere * each, work.load.response * weights / rate)
    how = f"{work.responses:,} x {work.response:,} tokens, {everywhere} at once: {everywhere / each:,.0f} tokens/s"
    return Time("rollout", seconds, how)


def _scoring(gpu: Gpu, servers: Sequence[Served], work: Work, shares: Mapping[str, float]) -> Time:
    """Prefill by the busiest teacher; teachers that share a server count as if each had it alone."""
    rates: dict[str, float] = defaultdict(float)
    models: dict[str, Model] = {}
    for server in servers:
        for name in server.teachers:
            rates[name] += server.engine.tensor_parallel * gpu.tflops * 1e12 * PREFILL
            models[name] = server.model
    seconds = {name: flops(models[name], work.tokens * shares[name], work.context, 1) / rates[name] for name in models}
    if not seconds:
        return Time("scoring", 0.0, "no teacher is served by mmopd")
    slowest = max(seconds, key=lambda name: seconds[name])
    return Time("scoring", seconds[slowest], f"{slowest}: prefill of {shares[slowest]:.0%} of the responses, meanwhile")


def _update(recipe: Recipe, gpu: Gpu, student: Model, work: Work) -> Time:
    """Forward, backward and, with checkpointing, forward again, over all responses; and once more before it for recomputed log-probs.

    A prompt is computed once for its group, unless layers have a state along the row (linear attention).
    """
    passes = 3 + recipe.train.gradient_checkpointing + recipe.recomputes
    prompts = work.prompts if student.text.caching == student.text.layers else work.responses
    asked, answered = prompts * work.prompt, work.responses * work.response
    total = flops(student, asked, work.prompt, passes) + flops(student, answered, 2 * work.prompt + work.response, passes)
    if work.load.images and student.vision:
        total += 2 * passes * student.tower * asked * student.vision.merge
    seconds = total / (recipe.train.ranks * gpu.tflops * 1e12 * UPDATE)
    return Time("update", seconds, f"{2 * passes} FLOP for each number and token, {(asked + answered) / 1e6:.1f} M tokens")
