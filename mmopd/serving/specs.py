"""Specifications of the servers: a model, its engine settings, and the vLLM arguments for them.

GPU flags are taken from the source of vLLM 0.32; not run on a GPU.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmopd.config import Engine, Fleet, Student, Sync
from mmopd.modality.registry import MEDIA
from mmopd.serving import repeatable
from mmopd.serving.lora import Adapter, lora_flags, read_adapter
from mmopd.serving.supervisor import RequireKey, Server

KV_CACHE_MIB = 256  # on CPU; default for engine.kv_cache_mib
BATCHED_TOKENS = 4096  # on CPU, in one forward pass
BLOCK = 32  # tokens; on CPU, the smallest for its fast kernels. Whole blocks of a prompt are shared by its responses.
# Longest name of a server that several teachers share; the name is also that of its log.
LONGEST_NAME = 80
NO_DOMAIN = "no domain"  # no URL contains a blank, so that no URL in a prompt is ever fetched


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """A model to serve.

    `updatable` opens the routes that change its weights. After a restart it has the weights of the folder again.
    """

    name: str
    model: Path
    engine: Engine
    updatable: bool
    # Keys are the names of their endpoints. If there are adapters, the model itself has no endpoint.
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    sync: Sync = "file"  # transport of new weights, if the server is updatable

    @property
    def served(self) -> Sequence[str]:
        """Names of its endpoints.

        With adapters the model itself has none: on CPU vLLM 0.32 scores it with the last adapter when both are in one
        batch.
        """
        return list(self.adapters) or [self.name]


def student_specs(student: Student) -> list[ServerSpec]:
    """Return the specifications of the student's engines: `student`, `student-2`, ..."""
    return [
        ServerSpec(
            f"student-{i + 1}" if i else "student",
            student.model,
            replica_engine(student.engine, i),
            updatable=True,
            sync=student.sync,
        )
        for i in range(student.replicas)
    ]


def to_specs(fleet: Fleet, elsewhere: Collection[str] = ()) -> list[ServerSpec]:
    """Return the servers to start: those of the teachers that have a `model`.

    Teachers with adapters of the same model share servers if their engine settings and number of replicas are equal.
    Each teacher is an endpoint with its own name there. A teacher without an adapter has servers of its own.

    Args:
        fleet: the teachers.
        elsewhere: teachers that are not served here.

    Raises:
        CheckpointError: an adapter cannot be served.
    """
    shared: dict[tuple[Path, Engine, int, str], dict[str, Path | None]] = {}
    for name, teacher in fleet.teachers.items():
        if teacher.model is not None and name not in elsewhere:
            alone = "" if teacher.adapter else name
            shared.setdefault((teacher.model, teacher.engine, teacher.replicas, alone), {})[name] = teacher.adapter
    specs: list[ServerSpec] = []
    for (model, engine, replicas, _), group in shared.items():
        adapters = {name: read_adapter(folder) for name, folder in group.items() if folder}
        for i in range(replicas):
            served = {f"{name}.{i}": adapter for name, adapter in adapters.items()}
            specs.append(
                ServerSpec(
                    f"{_joined(list(group))}.{i}", model, replica_engine(engine, i), updatable=False, adapters=served
                )
            )
    return specs


def replica_engine(engine: Engine, i: int) -> Engine:
    """Return the settings of replica `i`, which differ in the port."""
    return engine.model_copy(update={"port": engine.port + i if engine.port else None})


def to_server(spec: ServerSpec, address: tuple[str, int], log: Path, gpus: str) -> Server:
    """Return vLLM's arguments for a server (without GPUs: on CPU); the engine's `extra_args` come last and take
    precedence.
    """
    engine = spec.engine
    argv = [
        "--model",
        str(spec.model),
        "--served-model-name",
        spec.name,
        "--host",
        address[0],
        "--port",
        str(address[1]),
    ]
    argv += [
        "--dtype",
        engine.dtype,
        "--max-model-len",
        str(engine.max_model_len),
        "--max-num-seqs",
        str(engine.max_num_seqs),
    ]
    limits = {medium: getattr(engine, medium.limit) for medium in MEDIA.values() if medium.limit}
    argv += ["--limit-mm-per-prompt", json.dumps({medium.slot: n for medium, n in limits.items()})]
    argv += ["--enable-scale-out"]
    # Where a client is silent, neutral values hold, not those of the model's generation_config.json. Of that file vLLM
    # 0.32 still takes the list of end tokens.
    argv += ["--generation-config", "vllm"]
    reading = {medium.slot: medium.io_settings for medium, n in limits.items() if n}
    argv += ["--media-io-kwargs", json.dumps(reading)] if reading else []
    argv += ["--disable-uvicorn-access-log", "--disable-log-stats"]
    argv += ["--middleware", f"{RequireKey.__module__}.{RequireKey.__qualname__}", "--allowed-media-domains", NO_DOMAIN]
    if not gpus:
        # The class is given by its path: vLLM would replace the name "uni" on CPU by an executor with one more process.
        argv += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
        argv += ["--enforce-eager", "--kv-cache-memory-bytes", str((engine.kv_cache_mib or KV_CACHE_MIB) << 20)]
        # vLLM 0.32 on CPU crashes if the prefill of a prompt is split and its request has a seed ("CPU Generator does
        # not use offset").
        argv += [
            "--no-enable-chunked-prefill",
            "--max-num-batched-tokens",
            str(max(BATCHED_TOKENS, engine.max_model_len)),
            "--block-size",
            str(BLOCK),
        ]
    else:
        argv += [
            "--tensor-parallel-size",
            str(engine.tensor_parallel),
            "--gpu-memory-utilization",
            str(engine.gpu_share),
        ]
        argv += ["--enforce-eager"] * engine.enforce_eager
        argv += ["--kv-cache-memory-bytes", str(engine.kv_cache_mib << 20)] if engine.kv_cache_mib else []
    if spec.updatable:
        argv += ["--weight-transfer-config", json.dumps({"backend": f"mmopd_{spec.sync}"})]
        argv += ["--enable-sleep-mode"] * (spec.sync == "ipc")
    argv += lora_flags(spec.adapters) if spec.adapters else []
    env = {"VLLM_SERVER_DEV_MODE": "1" if spec.updatable else "0"} | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
    env |= repeatable.environment(engine, gpu=bool(gpus))
    return Server(name=spec.name, model=str(spec.model), argv=[*argv, *engine.extra_args], log=str(log), env=env)


def _joined(teachers: Sequence[str]) -> str:
    """Return a name for servers that these teachers share."""
    name = "+".join(teachers)
    return name if len(name) <= LONGEST_NAME else f"{teachers[0]}+{len(teachers) - 1}"
