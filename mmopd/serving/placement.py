"""Places for servers: which GPUs each of them gets, and whether the memory of a machine without GPUs suffices."""

import itertools
import json
import os
from collections.abc import Collection, Sequence

import psutil

from mmopd.errors import ServerError
from mmopd.serving.specs import KV_CACHE_MIB, ServerSpec

SHARED_MIB = 700  # measured: the process that has imported vLLM ...
SERVER_MIB = 600  # ... and what a server under load adds to it, weights and KV cache apart
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def place(sizes: Sequence[int], gpus: int, sharing: Collection[int] = ()) -> list[list[int]]:
    """GPUs of each server by its number of them, as `mmopd train` gives them: from the last one down, and around.

    Args:
        sharing: servers that share the GPU of rank 0, which is the first.
    """
    ends = itertools.accumulate((0 if i in sharing else size for i, size in enumerate(sizes)), initial=0)
    own = [[(gpus - 1 - begin - i) % gpus for i in range(size)] for begin, size in zip(ends, sizes, strict=False)]
    return [[0] if i in sharing else places for i, places in enumerate(own)]


def assign_gpus(specs: Sequence[ServerSpec]) -> dict[str, str]:
    """GPUs for each server, of those that this process may use: training ranks take theirs from the first one up. [not
    run]
    """
    import torch  # takes seconds, and `mmopd plan` only calls `place`

    sharing = [i for i, spec in enumerate(specs) if spec.sync == "ipc"]
    places = place([spec.engine.tensor_parallel for spec in specs], torch.cuda.device_count(), sharing)
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(
        ","
    )  # numbers or UUIDs; a server's own variable counts from the machine's
    names = mine if mine != [""] else [str(i) for i in range(torch.cuda.device_count())]
    return {spec.name: ",".join(names[i] for i in gpus) for spec, gpus in zip(specs, places, strict=True)}


def check_memory(specs: Sequence[ServerSpec]) -> None:
    """There is memory for the servers: vLLM's own, weights, KV caches.

    Raises:
        UserError: there is not; says how much of what is needed.
    """
    weights = sum(_weights_mib(spec) for spec in specs)
    cache = sum(spec.engine.kv_cache_mib or KV_CACHE_MIB for spec in specs)
    own = SHARED_MIB + SERVER_MIB * len(specs)
    free = psutil.virtual_memory().available >> 20
    if own + weights + cache > free:
        raise ServerError(
            f"{len(specs)} vLLM servers need about {own + weights + cache:,} MiB of memory (vLLM {own:,}, weights "
            f"{weights:,}, "
            f"KV cache {cache:,}) and {free:,} MiB are free: lower engine.kv_cache_mib, or end other programs"
        )


def _weights_mib(spec: ServerSpec) -> int:
    files = sum(file.stat().st_size for file in spec.model.glob("*.safetensors"))
    config = json.loads((spec.model / "config.json").read_text())
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    served = stored if spec.engine.dtype == "auto" else spec.engine.dtype
    return files * DTYPE_BYTES.get(served, 2) // DTYPE_BYTES.get(stored, 2) >> 20
