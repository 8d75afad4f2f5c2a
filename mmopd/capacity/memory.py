"""What a recipe needs of GPUs: memory by role and a step's time, by arithmetic. Nothing in here has been measured on a
GPU.

What is exact: the numbers of a model (`sizes`), the state of ZeRO-3, the bytes of a KV cache. What is a bound:
    activations, buffers, the
full log-probs of a teacher. What is assumed is a constant with a name, and `mmopd plan` prints it. Bytes unless said
otherwise.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mmopd.capacity.model_size import Model
from mmopd.config import Engine, Recipe, Train
from mmopd.errors import UserError
from mmopd.settings_file import suggest
from mmopd.train.limits import GPU_CHUNK, KEYS, RESIDENT, ROWS

GIB = 1 << 30
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}  # bytes of a number; published weights are bfloat16

# Of DeepSpeed's defaults, which `train.engine` leaves as they are; numbers, not bytes.
REDUCE_BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000
SUB_GROUP = 1_000_000_000
HEAD_ROWS = 2048  # of Liger's head: rows whose tile of logits exists at once

# Assumed.
TRAINER_OWN = 3 * GIB  # CUDA context, NCCL, fragments
ENGINE_OWN = 1 * GIB  # CUDA context, NCCL
GRAPHS = 1 * GIB  # CUDA graphs, unless enforce_eager
IMAGE_TOKENS = 16384  # of one image, at most, as Qwen-VL's processors come


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU: usable memory in GiB, dense bfloat16 TFLOP/s, memory bandwidth in GB/s, as published."""

    name: str
    memory: float
    tflops: float
    bandwidth: float

    @property
    def batched_tokens(self) -> int:
        """vLLM 0.32's own limit of tokens in one pass of a server on it."""
        if self.memory >= 160:
            return 16384
        return 8192 if self.memory >= 70 and "A100" not in self.name else 2048


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200-141G", 140.4, 989, 4800),
        Gpu("H100-80G", 79.6, 989, 3350),
        Gpu("H20-96G", 95.6, 148, 4000),
        Gpu("A100-80G", 80.0, 312, 2039),
        Gpu("A100-40G", 40.0, 312, 1555),
        Gpu("L40S-48G", 45.0, 362, 864),
    )
}


def find_gpu(
    name: str, memory: float | None = None, tflops: float | None = None, bandwidth: float | None = None
) -> Gpu:
    """A known GPU by its name, or another one by its three numbers.

    Raises:
        UserError: the name is unknown, or only some of the numbers are given.
    """
    given = (memory, tflops, bandwidth)
    if any(number is not None for number in given):
        if memory is None or tflops is None or bandwidth is None:
            raise UserError("another GPU is described by --gpu-memory, --tflops and --bandwidth together")
        return Gpu("GPU", memory, tflops, bandwidth)
    if name not in GPUS:
        raise UserError(f"--gpu {name}: not known{suggest(name, GPUS)}; or give --gpu-memory, --tflops and --bandwidth")
    return GPUS[name]


class Part(NamedTuple):
    """Memory of one thing on one GPU."""

    what: str
    size: float
    how: str


class Load(NamedTuple):
    """The largest sample of a recipe."""

    prompt: int  # tokens, images included
    response: int
    images: bool
    patches: int  # vision patches of its images

    @property
    def tokens(self) -> int:
        """Of prompt and response."""
        return self.prompt + self.response


def zero_state(model: Model, train: Train, ranks: int) -> dict[str, int]:
    """What ZeRO-3 keeps on each rank between steps: weights, small weights that stay whole, gradients, optimiser;
    pieces are rounded up.
    """
    width = WIDTH[train.dtype]
    shard = sum(-(-weight.numbers // ranks) for weight in model.weights)
    trained = sum(-(-weight.numbers // ranks) for weight in model.weights if weight.trained)
    return {
        "weights": width * shard,
        "small weights": width * sum(weight.numbers for weight in model.weights if weight.numbers <= RESIDENT),
        "gradients": width * trained,
        "optimiser": 12
        * trained,  # two moments and the weights in float32, also beside weights that are float32 already
    }


def offloaded(state: Mapping[str, int], train: Train) -> int:
    """Host memory of a rank with train.offload: its state, and the gradients once more, in float32, for DeepSpeed's
    Adam on the CPU.
    """
    whole = state["gradients"] * 4 // WIDTH[train.dtype]
    return state["weights"] + state["gradients"] + whole + state["optimiser"]


def trainer(model: Model, recipe: Recipe, ranks: int, load: Load) -> list[Part]:
    """Memory of one training rank. The last two parts are never there at the same time."""
    train = recipe.train
    width = WIDTH[recipe.train.dtype]
    tokens = max(train.micro_tokens, load.tokens)
    patches = max(train.micro_patches, load.patches) if load.images else 0
    largest = max(weight.numbers for weight in model.weights)
    state = zero_state(model, train, ranks)
    on_cpu = " (in CPU memory)" if train.offload else ""
    parts = [
        Part(name + on_cpu, 0 if train.offload else size, _state_how(name, train, ranks))
        for name, size in state.items()
        if size and not (train.offload and name == "small weights")
    ]
    live = min(model.numbers, MAX_LIVE + largest)
    if train.offload:
        parts.append(
            Part(
                "host memory",
                0,
                f"{offloaded(state, train) / GIB:.1f} GiB at least of the machine's own, for each rank",
            )
        )
    parts.append(Part("gathered weights", width * live, "DeepSpeed's limit of 1e9 live numbers and the largest weight"))
    parts.append(
        Part(
            "gradients in flight",
            width * (REDUCE_BUCKET + largest),
            "reduce bucket of 5e8 numbers and the largest gradient",
        )
    )
    parts.append(Part("CUDA, NCCL, fragments", TRAINER_OWN, "assumed"))
    how = f"{tokens:,} tokens and {patches:,} patches, {'recomputed' if train.gradient_checkpointing else 'all kept'}"
    parts.append(Part("activations", activations(model, train, tokens, patches), how))
    parts.append(
        Part(
            "log-prob head", head(model, recipe, tokens), "float32 gradients of head and hidden states, tiles of logits"
        )
    )
    return parts


def step_memory(model: Model, train: Train, ranks: int) -> float:
    """What the optimiser's step needs beside the state, when activations are gone: gradient and denominator of a
    sub-group in float32.
    """
    trained = sum(-(-weight.numbers // ranks) for weight in model.weights if weight.trained)
    return (
        0
        if train.offload
        else 8.0 * min(trained, SUB_GROUP + -(-max(weight.numbers for weight in model.weights) // ranks))
    )


def peak(parts: Sequence[Part], step: float) -> float:
    """Of a training rank: everything but activations and head is always there; then those, or the optimiser's step."""
    *always, passing, last = (part.size for part in parts)
    return sum(always) + max(passing + last, step)


def layer(model: Model, width: int) -> tuple[float, float]:
    """Bytes that autograd keeps of one layer: for a token of the language model, for a patch of the tower; with flash
    attention.
    """
    text = model.text
    tower = model.vision
    norms = (4 + width) * (
        2 * text.hidden + text.query + text.key
    )  # each keeps its input in float32, and what it multiplies
    token = norms + width * (2 * text.query + 2 * text.key + 2 * text.hidden + 4 * text.intermediate)
    return token, width * (11 * tower.hidden + 2 * tower.intermediate) if tower else 0.0


def activations(model: Model, train: Train, tokens: int, patches: int) -> float:
    """Of forward and backward pass over a micro-batch, the head apart; at most, where short responses share long
    prompts (`tree.KEYS`).
    """
    width = WIDTH[train.dtype]
    text = model.text
    tower = model.vision
    token, patch = layer(model, width)
    token += width * 2 * text.key * (KEYS - 1)
    flowing = width * tokens * (4 * text.intermediate + 4 * text.hidden)  # gradients inside the layer that is at work
    handed = width * text.hidden * (patches / tower.merge) * tower.levels if tower else 0.0
    if not train.gradient_checkpointing:
        return text.layers * tokens * token + (tower.depth * patches * patch if tower else 0) + handed + flowing
    entries = width * (text.layers * tokens * text.hidden + (tower.depth * patches * tower.hidden if tower else 0))
    return entries + handed + max(tokens * token + flowing, 2 * patches * patch)


def head(model: Model, recipe: Recipe, tokens: int) -> float:
    """Of the log-prob head: V x H and T x H gradients in float32 and again in the model's width, and the logits that
    exist at once.
    """
    text = model.text
    width = WIDTH[recipe.train.dtype]
    tied = not model.embedding
    trained = any(
        weight.trained
        for weight in model.weights
        if weight.name.endswith("embed_tokens.weight" if tied else "lm_head.weight")
    )
    several = recipe.algorithm.objective.likeliest() > 0
    logits = 4 * ROWS * text.vocabulary * 4 if several else 4 * HEAD_ROWS * GPU_CHUNK * 4
    return trained * (4 + width) * text.vocabulary * text.hidden + (4 + 2 * width) * tokens * text.hidden + logits


def kv_bytes(model: Model, engine: Engine) -> int:
    """Of one token in the KV cache on each GPU of an engine; a head that cannot be split is on several."""
    text = model.text
    return 2 * text.caching * max(1, text.kv_heads // engine.tensor_parallel) * text.head_size * WIDTH[engine.dtype]


def batched_tokens(engine: Engine, gpu: Gpu) -> int:
    """Tokens in one pass of an engine: its own `--max-num-batched-tokens`, or vLLM's default."""
    flags = [part for argument in engine.extra_args for part in argument.split("=", 1)]
    given = [value for flag, value in itertools.pairwise(flags) if flag == "--max-num-batched-tokens"]
    return int(given[-1]) if given and given[-1].isdecimal() else gpu.batched_tokens


def server(model: Model, engine: Engine, gpu: Gpu, *, scores: bool) -> list[Part]:
    """Memory of a vLLM server on each of its GPUs. The KV cache takes what its share leaves, unless engine.kv_cache_mib
    says how much.

    Args:
        scores: it is a teacher, whose full log-probs of a pass are not in what vLLM reserves for itself.
    """
    width = WIDTH[engine.dtype]
    split = engine.tensor_parallel
    at_once = batched_tokens(engine, gpu)
    text = model.text
    work = (
        width * at_once * (6 * text.hidden + 3 * text.intermediate / split) + 10 * engine.max_num_seqs * text.vocabulary
    )
    parts = [
        Part(
            "weights",
            width * model.numbers / split,
            f"{model.numbers / 1e9:.2f} G numbers" + (f" / {split}" if split > 1 else ""),
        ),
        Part("work of a pass", work, f"{at_once:,} tokens, logits of {engine.max_num_seqs} sequences"),
    ]
    if model.vision:
        seen = max(at_once, min(IMAGE_TOKENS, engine.max_model_len))
        tower = model.vision
        passing = tower.merge * seen * (width * (8 * tower.hidden + 2 * tower.intermediate) / split + 8 * tower.hidden)
        kept = width * seen * text.hidden * tower.levels
        parts.append(Part("images", passing + kept, f"encoder pass and cache for {seen:,} visual tokens"))
    if not engine.enforce_eager:
        parts.append(Part("CUDA graphs", GRAPHS, "assumed"))
    parts.append(Part("CUDA, NCCL", ENGINE_OWN, "assumed"))
    taken = sum(part.size for part in parts)
    cache = engine.kv_cache_mib * (1 << 20) if engine.kv_cache_mib else engine.gpu_share * gpu.memory * GIB - taken
    per_token = kv_bytes(model, engine)
    room = max(0, int(cache // per_token)) if per_token else 0
    parts.append(
        Part(
            "KV cache",
            max(0.0, cache),
            f"{room:,} tokens of {per_token / 1024:.0f} KiB, {room / engine.max_model_len:.1f} x "
            f"{engine.max_model_len:,}",
        )
    )
    if scores:
        full = (4 + width) * at_once * text.vocabulary
        parts.append(
            Part("prompt log-probs", full, f"{at_once:,} x {text.vocabulary:,} logits and float32, beyond gpu_share")
        )
    return parts


def kv_tokens(parts: Iterable[Part], per_token: int) -> int:
    """Tokens that fit the KV cache of a server."""
    cache = next(part.size for part in parts if part.what == "KV cache")
    return int(cache // per_token) if per_token else 0


def short_of_kv(model: Model, engine: Engine, gpu: Gpu) -> float:
    """Bytes by which a KV cache is too small for one sequence of max_model_len, which vLLM refuses; negative if it is
    not.
    """
    parts = server(model, engine, gpu, scores=False)
    left = engine.gpu_share * gpu.memory * GIB - sum(part.size for part in parts if part.what != "KV cache")
    have = engine.kv_cache_mib * (1 << 20) if engine.kv_cache_mib else left
    return engine.max_model_len * kv_bytes(model, engine) - have


def ranks_by_node(ranks: int, gpus: int, nodes: int) -> list[int]:
    """Ranks of each node: the others are filled first, since the servers are on the first one, which has rank 0 at
    least.
    """
    others = min(ranks - 1, gpus * (nodes - 1))
    rest = [min(gpus, max(0, others - gpus * node)) for node in range(nodes - 1)]
    return [ranks - others, *rest]


def _state_how(name: str, train: Train, ranks: int) -> str:
    width = WIDTH[train.dtype]
    each = {
        "weights": f"{width} B a number / {ranks}",
        "small weights": "norms and biases stay whole",
        "gradients": f"{width} B a trained number / {ranks}",
        "optimiser": f"float32 weights and two moments, 12 B / {ranks}",
    }
    return each[name]


def ceil_gib(size: float) -> float:
    """GiB, rounded up to a tenth: a shortage that is shown is never 0."""
    return math.ceil(10 * size / GIB) / 10
