"""GPU memory that a recipe needs, by role, computed from the configurations. Not measured on a GPU.

Exact: the parameters of a model (`model_size`), the state of ZeRO-3, the bytes of a KV cache. Upper bounds:
activations, buffers, the full log-probs of a teacher. Each assumption is a named constant, and `mmopd plan` prints it.
All values are bytes unless another unit is named.
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
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}  # bytes of a value; published weights are bfloat16

# Defaults of DeepSpeed, which `train.engine` does not change; parameters, not bytes.
REDUCE_BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000
SUB_GROUP = 1_000_000_000
HEAD_ROWS = 2048  # rows of Liger's head whose tile of logits exists at the same time

# Assumptions.
TRAINER_OWN = 3 * GIB  # CUDA context, NCCL, fragments
ENGINE_OWN = 1 * GIB  # CUDA context, NCCL
GRAPHS = 1 * GIB  # CUDA graphs, without enforce_eager
IMAGE_TOKENS = 16384  # largest number of tokens of one image, with the defaults of Qwen-VL's processors


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU: usable memory in GiB, dense bfloat16 TFLOP/s, memory bandwidth in GB/s, as published."""

    name: str
    memory: float
    tflops: float
    bandwidth: float

    @property
    def batched_tokens(self) -> int:
        """Default limit of vLLM 0.32 for the tokens in one pass of a server on this GPU."""
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
    """Return a known GPU by its name, or another GPU by its three values.

    Raises:
        UserError: the name is unknown, or only some of the values are given.
    """
    given = (memory, tflops, bandwidth)
    if any(number is not None for number in given):
        if memory is None or tflops is None or bandwidth is None:
            raise UserError("a GPU that is not in the list needs --gpu-memory, --tflops and --bandwidth together")
        return Gpu("GPU", memory, tflops, bandwidth)
    if name not in GPUS:
        raise UserError(f"--gpu {name}: not known{suggest(name, GPUS)}; or give --gpu-memory, --tflops and --bandwidth")
    return GPUS[name]


class Part(NamedTuple):
    """Memory of one item on one GPU."""

    what: str
    size: float
    how: str


class Load(NamedTuple):
    """Largest sample of a recipe."""

    prompt: int  # tokens, images included
    response: int
    images: bool
    patches: int  # vision patches of its images

    @property
    def tokens(self) -> int:
        """Tokens of prompt and response."""
        return self.prompt + self.response


def zero_state(model: Model, train: Train, ranks: int) -> dict[str, int]:
    """Return what ZeRO-3 keeps on each rank between steps: weights, small weights that stay gathered, gradients,
    optimiser.

    Shards are rounded up.
    """
    width = WIDTH[train.dtype]
    shard = sum(-(-weight.parameters // ranks) for weight in model.weights)
    trained = sum(-(-weight.parameters // ranks) for weight in model.weights if weight.trained)
    # Two moments and the weights in float32, even if the weights are in float32 already.
    return {
        "weights": width * shard,
        "small weights": width * sum(weight.parameters for weight in model.weights if weight.parameters <= RESIDENT),
        "gradients": width * trained,
        "optimiser": 12 * trained,
    }


def offloaded(state: Mapping[str, int], train: Train) -> int:
    """Return the host memory of a rank with train.offload.

    It holds the state of the rank, and the gradients again in float32 for DeepSpeed's Adam on the CPU.
    """
    whole = state["gradients"] * 4 // WIDTH[train.dtype]
    return state["weights"] + state["gradients"] + whole + state["optimiser"]


def trainer(model: Model, recipe: Recipe, ranks: int, load: Load) -> list[Part]:
    """Return the memory of one training rank. The last two parts are freed before the optimiser's step."""
    train = recipe.train
    width = WIDTH[recipe.train.dtype]
    tokens = max(train.micro_tokens, load.tokens)
    patches = max(train.micro_patches, load.patches) if load.images else 0
    largest = max(weight.parameters for weight in model.weights)
    state = zero_state(model, train, ranks)
    on_cpu = " (in CPU memory)" if train.offload else ""
    parts = [
        Part(name + on_cpu, 0 if train.offload else size, _state_how(name, train, ranks))
        for name, size in state.items()
        if size and not (train.offload and name == "small weights")
    ]
    live = min(model.parameters, MAX_LIVE + largest)
    if train.offload:
        parts.append(
            Part(
                "host memory",
                0,
                f"{offloaded(state, train) / GIB:.1f} GiB of the machine's memory for each rank, at least",
            )
        )
    parts.append(
        Part("gathered weights", width * live, "DeepSpeed's limit of 1e9 live parameters, and the largest weight")
    )
    parts.append(
        Part(
            "gradients in flight",
            width * (REDUCE_BUCKET + largest),
            "reduce bucket of 5e8 values, and the largest gradient",
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
    """Return the memory of the optimiser's step in addition to the state, after the activations are freed.

    It holds gradient and denominator of a sub-group in float32.
    """
    trained = sum(-(-weight.parameters // ranks) for weight in model.weights if weight.trained)
    return (
        0
        if train.offload
        else 8.0 * min(trained, SUB_GROUP + -(-max(weight.parameters for weight in model.weights) // ranks))
    )


def peak(parts: Sequence[Part], step: float) -> float:
    """Return the peak of a training rank.

    All parts but activations and head always exist; in addition either those two exist, or the memory of the
    optimiser's step.
    """
    *always, passing, last = (part.size for part in parts)
    return sum(always) + max(passing + last, step)


def layer(model: Model, width: int) -> tuple[float, float]:
    """Return the bytes that autograd keeps of one layer: for a token of the language model, for a patch of the tower.

    Flash attention is assumed.
    """
    text = model.text
    tower = model.vision
    # Each norm keeps its input in float32, and the factor that it multiplies.
    norms = (4 + width) * (2 * text.hidden + text.query + text.key)
    token = norms + width * (2 * text.query + 2 * text.key + 2 * text.hidden + 4 * text.intermediate)
    return token, width * (11 * tower.hidden + 2 * tower.intermediate) if tower else 0.0


def activations(model: Model, train: Train, tokens: int, patches: int) -> float:
    """Return the memory of forward and backward pass over a micro-batch, without the head.

    It is an upper bound for short responses that share long prompts (`limits.KEYS`).
    """
    width = WIDTH[train.dtype]
    text = model.text
    tower = model.vision
    token, patch = layer(model, width)
    token += width * 2 * text.key * (KEYS - 1)
    flowing = width * tokens * (4 * text.intermediate + 4 * text.hidden)  # gradients inside the current layer
    handed = width * text.hidden * (patches / tower.merge) * tower.levels if tower else 0.0
    if not train.gradient_checkpointing:
        return text.layers * tokens * token + (tower.depth * patches * patch if tower else 0) + handed + flowing
    entries = width * (text.layers * tokens * text.hidden + (tower.depth * patches * tower.hidden if tower else 0))
    return entries + handed + max(tokens * token + flowing, 2 * patches * patch)


def head(model: Model, recipe: Recipe, tokens: int) -> float:
    """Return the memory of the log-prob head.

    It holds V x H and T x H gradients in float32 and again in the model's dtype, and the logits that exist at the same
    time.
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
    """Return the bytes of one token in the KV cache on each GPU of an engine; a head that cannot be split is on
    several.
    """
    text = model.text
    return 2 * text.caching * max(1, text.kv_heads // engine.tensor_parallel) * text.head_size * WIDTH[engine.dtype]


def batched_tokens(engine: Engine, gpu: Gpu) -> int:
    """Return the tokens in one pass of an engine: its own `--max-num-batched-tokens`, or vLLM's default."""
    flags = [part for argument in engine.extra_args for part in argument.split("=", 1)]
    given = [value for flag, value in itertools.pairwise(flags) if flag == "--max-num-batched-tokens"]
    return int(given[-1]) if given and given[-1].isdecimal() else gpu.batched_tokens


def server(model: Model, engine: Engine, gpu: Gpu, *, scores: bool) -> list[Part]:
    """Return the memory of a vLLM server on each of its GPUs.

    The KV cache takes the rest of `gpu_share`, unless engine.kv_cache_mib sets its size.

    Args:
        model: the model.
        engine: its engine settings.
        gpu: kind of GPU.
        scores: true for a teacher, whose full log-probs of a pass are not in the memory that vLLM reserves.
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
            width * model.parameters / split,
            f"{model.parameters / 1e9:.2f} G parameters" + (f" / {split}" if split > 1 else ""),
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
    """Return the tokens that fit into the KV cache of a server."""
    cache = next(part.size for part in parts if part.what == "KV cache")
    return int(cache // per_token) if per_token else 0


def short_of_kv(model: Model, engine: Engine, gpu: Gpu) -> float:
    """Return the bytes that a KV cache lacks for one sequence of max_model_len; vLLM refuses to start without them.

    The value is negative if the cache is large enough.
    """
    parts = server(model, engine, gpu, scores=False)
    left = engine.gpu_share * gpu.memory * GIB - sum(part.size for part in parts if part.what != "KV cache")
    have = engine.kv_cache_mib * (1 << 20) if engine.kv_cache_mib else left
    return engine.max_model_len * kv_bytes(model, engine) - have


def ranks_by_node(ranks: int, gpus: int, nodes: int) -> list[int]:
    """Return the number of ranks on each node.

    The servers run on the first node, which always has rank 0; the other nodes are filled first.
    """
    others = min(ranks - 1, gpus * (nodes - 1))
    rest = [min(gpus, max(0, others - gpus * node)) for node in range(nodes - 1)]
    return [ranks - others, *rest]


def _state_how(name: str, train: Train, ranks: int) -> str:
    width = WIDTH[train.dtype]
    each = {
        "weights": f"{width} B per parameter / {ranks}",
        "small weights": "norms and biases stay gathered",
        "gradients": f"{width} B per trained parameter / {ranks}",
        "optimiser": f"float32 weights and two moments, 12 B / {ranks}",
    }
    return each[name]


def ceil_gib(size: float) -> float:
    """Return GiB, rounded up to a tenth, so that a shortage is never shown as 0."""
    return math.ceil(10 * size / GIB) / 10
