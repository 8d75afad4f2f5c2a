"""The servers to start: a model, its engine settings, and the arguments of vLLM that these stand for.

GPU flags are read from vLLM 0.32, not run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmopd.config import Engine, Student, Sync
from mmopd.modality.video import MEDIA_SETTINGS
from mmopd.serving.lora import Adapter, lora_flags
from mmopd.serving.supervisor import RequireKey, Server

KV_CACHE_MIB = 256  # on CPU, if the engine does not say
BATCHED_TOKENS = 4096  # on CPU, in one pass
NO_DOMAIN = "no domain"  # a blank is in no URL: whatever a prompt names, nothing is fetched


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """A model to serve; `updatable` opens the routes that change its weights, which are those of the folder again where
    it dies.
    """

    name: str
    model: Path
    engine: Engine
    updatable: bool
    adapters: Mapping[str, Adapter] = field(
        default_factory=dict
    )  # by the names of their endpoints; the model itself has none then
    sync: Sync = "file"  # how new weights come, if it is updatable

    @property
    def served(self) -> Sequence[str]:
        """The names of its endpoints.

        With adapters the model itself is not among them: on CPU vLLM 0.32 scores it with the last adapter when both are
            in one batch.
        """
        return list(self.adapters) or [self.name]


def student_specs(student: Student) -> list[ServerSpec]:
    """The student's engines: `student`, `student-2`, ..."""
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


def replica_engine(engine: Engine, i: int) -> Engine:
    """The settings of a replica: a port of its own."""
    return engine.model_copy(update={"port": engine.port + i if engine.port else None})


def to_server(spec: ServerSpec, address: tuple[str, int], log: Path, gpus: str) -> Server:
    """vLLM's arguments for a spec (without GPUs: on CPU); the engine's own extra arguments come last, and win."""
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
    argv += ["--limit-mm-per-prompt", json.dumps({"video": engine.videos}), "--enable-scale-out"]
    argv += ["--media-io-kwargs", json.dumps(MEDIA_SETTINGS)] if engine.videos else []
    argv += ["--disable-uvicorn-access-log", "--disable-log-stats"]
    argv += ["--middleware", f"{RequireKey.__module__}.{RequireKey.__qualname__}", "--allowed-media-domains", NO_DOMAIN]
    if not gpus:
        # The class by its path: under the name "uni" vLLM would replace it, on CPU, by one more process.
        argv += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
        argv += ["--enforce-eager", "--kv-cache-memory-bytes", str((engine.kv_cache_mib or KV_CACHE_MIB) << 20)]
        # A prompt whose prefill is cut in two, and whose request has a seed, ends vLLM 0.32 on CPU ("CPU Generator does
        # not use offset").
        argv += [
            "--no-enable-chunked-prefill",
            "--max-num-batched-tokens",
            str(max(BATCHED_TOKENS, engine.max_model_len)),
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
    return Server(name=spec.name, model=str(spec.model), argv=[*argv, *engine.extra_args], log=str(log), env=env)
