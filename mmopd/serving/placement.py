"""Placement of servers: assign GPUs, and check the memory of a machine without GPUs."""

import itertools
import json
import os
from collections.abc import Collection, Sequence

from mmopd.config import Recipe
from mmopd.errors import ConfigError, ServerError
from mmopd.serving.specs import KV_CACHE_MIB, ServerSpec, student_specs

SHARED_MIB = 700  # measured: the process that has imported vLLM
SERVER_MIB = 600  # measured: added by each server under load, without weights and KV cache
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def place(sizes: Sequence[int], gpus: int, sharing: Collection[int] = ()) -> list[list[int]]:
    """Return the GPUs of each server, counted from the last GPU down and wrapping around, as `mmopd train` assigns
    them.

    Args:
        sizes: number of GPUs of each server.
        gpus: number of GPUs of the machine.
        sharing: servers that share GPU 0 with rank 0.
    """
    ends = itertools.accumulate((0 if i in sharing else size for i, size in enumerate(sizes)), initial=0)
    own = [[(gpus - 1 - begin - i) % gpus for i in range(size)] for begin, size in zip(ends, sizes, strict=False)]
    return [[0] if i in sharing else places for i, places in enumerate(own)]


def assign_gpus(specs: Sequence[ServerSpec]) -> dict[str, str]:
    """Return the GPUs of each server, chosen from those that this process may use.

    Training ranks take GPUs from the first one up.

    Raises:
        ConfigError: a server needs more GPUs than there are.
    """
    for spec in specs:
        if spec.engine.tensor_parallel > count_gpus():
            raise ConfigError(
                f"engine.tensor_parallel of server {spec.name!r} is {spec.engine.tensor_parallel}, and this machine "
                f"has {_gpus(count_gpus())}: lower it, or serve the model on another machine (`mmopd serve`)"
            )
    places = _places(specs)
    # These are numbers or UUIDs. CUDA_VISIBLE_DEVICES of a server refers to the GPUs of the machine.
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = mine if mine != [""] else [str(i) for i in range(count_gpus())]
    return {spec.name: ",".join(names[i] for i in gpus) for spec, gpus in zip(specs, places, strict=True)}


def check_gpus(recipe: Recipe, *, elsewhere: bool) -> None:
    """Check that ranks and engines have the GPUs that they need; without any GPU all run on the CPU.

    Args:
        recipe: the recipe.
        elsewhere: a launcher starts the ranks, so that they may run on other machines; rank 0 is here.

    Raises:
        ConfigError: there are too few GPUs.
    """
    gpus = count_gpus()
    if not gpus:
        return
    ranks = recipe.train.ranks
    if ranks > gpus and not elsewhere:
        raise ConfigError(
            f"train.ranks is {ranks}, and this machine has {_gpus(gpus)}, one for each rank: set train.ranks={gpus}, "
            "or start the ranks on several machines with --launcher"
        )
    used = [0, *itertools.chain.from_iterable(_places(student_specs(recipe.student)))]
    if recipe.student.sync == "broadcast" and len(set(used)) < len(used):
        raise ConfigError(
            f"student.sync: broadcast needs {len(used)} GPUs, one for rank 0 and {len(used) - 1} for the student's "
            f"engines, and this machine has {_gpus(gpus)}; NCCL does not share one. Set student.sync=file, "
            "or ipc for one engine"
        )


def count_gpus() -> int:
    """Return the number of GPUs that torch can use."""
    import torch  # takes seconds, and `mmopd plan` only calls `place`

    return torch.cuda.device_count()


def _places(specs: Sequence[ServerSpec]) -> list[list[int]]:
    """Return the GPUs of each server on this machine."""
    sharing = [i for i, spec in enumerate(specs) if spec.sync == "ipc"]
    return place([spec.engine.tensor_parallel for spec in specs], count_gpus(), sharing)


def _gpus(number: int) -> str:
    return f"{number} GPU{'s' * (number > 1)}"


def check_memory(specs: Sequence[ServerSpec]) -> None:
    """Check that there is enough memory for the servers: vLLM's own, weights, KV caches.

    Raises:
        ServerError: memory is short; the message shows how much is needed and how much is free.
    """
    import psutil  # `mmopd plan` only calls `place`

    weights = sum(_weights_mib(spec) for spec in specs)
    cache = sum(spec.engine.kv_cache_mib or KV_CACHE_MIB for spec in specs)
    own = SHARED_MIB + SERVER_MIB * len(specs)
    free = psutil.virtual_memory().available >> 20
    if own + weights + cache > free:
        raise ServerError(
            f"{len(specs)} vLLM servers need about {own + weights + cache:,} MiB of memory (vLLM {own:,}, weights "
            f"{weights:,}, KV cache {cache:,}), but only {free:,} MiB are free; lower engine.kv_cache_mib or end other "
            "programs"
        )


def _weights_mib(spec: ServerSpec) -> int:
    files = sum(file.stat().st_size for file in spec.model.glob("*.safetensors"))
    config = json.loads((spec.model / "config.json").read_text(encoding="utf-8"))
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    served = stored if spec.engine.dtype == "auto" else spec.engine.dtype
    return files * DTYPE_BYTES.get(served, 2) // DTYPE_BYTES.get(stored, 2) >> 20
