"""vLLM servers for teachers and student: started together, watched, stopped together.

Loopback only, on free ports, with an API key that is passed by environment. On CPU all servers are forked from one
process that has imported vLLM (`vllm_main`); on GPU each has a process of its own. GPU flags are read from vLLM 0.32,
not run.
"""

import json
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch

from mmopd.config import Engine
from mmopd.errors import UserError
from mmopd.processes import Child, Children
from mmopd.teacher.endpoint import Endpoint
from mmopd.teacher.vllm_main import KEY_VARIABLE, RequireKey, Server, ended

HOST = "127.0.0.1"
TIMEOUT = 1800.0  # seconds until all servers are ready; large checkpoints take minutes
KV_CACHE_MIB = 256  # on CPU, if the engine does not say
BATCHED_TOKENS = 4096  # on CPU, in one pass
SHARED_MIB = 700  # measured: the process that has imported vLLM ...
SERVER_MIB = 600  # ... and what a server under load adds to it, weights and KV cache apart
LAST_LINES = 12
_LOG_PREFIX = re.compile(r"^\(\S+ pid=\d+\) (?:[A-Z]+ \S+ \S+ \[[^\]]*\] )?")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

CPU_ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound, all servers would share core 0
    "TORCHDYNAMO_DISABLE": "1",  # no C++ compiler at run time, no stall at the first request
}
ENV = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """A model to serve; `updatable` opens the routes that change its weights."""

    name: str
    model: Path
    engine: Engine
    updatable: bool


class Servers(dict[str, Endpoint]):
    """Endpoints by name, and the processes behind them."""

    def __init__(self, endpoints: Sequence[Endpoint], children: Sequence[Child], logs: Path) -> None:
        super().__init__({endpoint.name: endpoint for endpoint in endpoints})
        self._children, self._logs = children, logs

    def check(self) -> None:
        """All servers still run.

        Raises:
            UserError: one has ended; with the last lines of its log.
        """
        for child in self._children:
            if child.alive:
                continue
            named = [name for name in self if ended(name) in child.tail(5).splitlines()]
            name, log = (named[0], self.log(named[0])) if named else (child.name, child.log)
            raise UserError(f"server {name!r} ended with status {child.returncode}; the last lines of {log}:\n{_last_words(log)}")

    def log(self, name: str) -> Path:
        """The log file of a server."""
        return log_of(self._logs, name)


def log_of(logs: Path, name: str) -> Path:
    """The log file of a server."""
    return logs / f"{name}.log"


@contextmanager
def serve(
    specs: Sequence[ServerSpec], children: Children, logs: Path, on_event: Callable[[str, str], None], timeout: float = TIMEOUT
) -> Iterator[Servers]:
    """Start all servers at once and yield their endpoints when all are ready; stop them at the end.

    Args:
        specs: with different names.
        children: where the processes are kept.
        logs: folder for one log per server.
        on_event: told (server's name, what happened), for a display.
        timeout: seconds until all must be ready.

    Raises:
        UserError: a model folder is missing, a port is taken, memory is short, a server ended or was not ready in time.
    """
    cpu = not torch.cuda.is_available()
    for spec in specs:
        if not (spec.model / "config.json").is_file():
            raise UserError(f"{spec.model}: no model to serve as {spec.name!r}: there is no config.json")
    if cpu:
        check_memory(specs)
    key = secrets.token_urlsafe(32)
    with ExitStack() as ports:
        reserved = [ports.enter_context(_reserve(spec)) for spec in specs]
        endpoints = [
            Endpoint(s.name, f"http://{HOST}:{port}", s.name, key, "student" if s.updatable else "teacher")
            for s, port in zip(specs, reserved, strict=True)
        ]
        to_run = [_server(spec, port, logs, cpu) for spec, port in zip(specs, reserved, strict=True)]
        if not cpu:
            _assign_gpus(specs, to_run)
        started = [_start(group, children, logs, key) for group in ([to_run] if cpu else [[server] for server in to_run])]
        servers = Servers(endpoints, started, logs)
        try:
            _await_ready(servers, on_event, time.monotonic() + timeout)
            yield servers
        finally:
            for child in started:
                child.terminate()
            for child in started:
                child.stop()


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
        raise UserError(
            f"{len(specs)} vLLM servers need about {own + weights + cache:,} MiB of memory (vLLM {own:,}, weights {weights:,}, "
            f"KV cache {cache:,}) and {free:,} MiB are free: lower engine.kv_cache_mib, or end other programs"
        )


def _weights_mib(spec: ServerSpec) -> int:
    files = sum(file.stat().st_size for file in spec.model.glob("*.safetensors"))
    config = json.loads((spec.model / "config.json").read_text())
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    served = stored if spec.engine.dtype == "auto" else spec.engine.dtype
    return files * DTYPE_BYTES.get(served, 2) // DTYPE_BYTES.get(stored, 2) >> 20


@contextmanager
def _reserve(spec: ServerSpec) -> Iterator[int]:
    """A port that nobody else is given: bound but not listening, so that the server (SO_REUSEADDR too) can still take it."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((HOST, spec.engine.port or 0))
        except OSError as error:
            raise UserError(
                f"port {spec.engine.port} for server {spec.name!r} cannot be used ({error.strerror}): "
                "set engine.port to another, or leave it out for a free one"
            ) from None
        yield int(held.getsockname()[1])


def _server(spec: ServerSpec, port: int, logs: Path, cpu: bool) -> Server:
    """vLLM's arguments for a spec; the engine's own extra arguments come last, and win."""
    engine = spec.engine
    argv = ["--model", str(spec.model), "--served-model-name", spec.name, "--host", HOST, "--port", str(port), "--dtype", engine.dtype]
    argv += ["--max-model-len", str(engine.max_model_len), "--max-num-seqs", str(engine.max_num_seqs)]
    argv += ["--limit-mm-per-prompt", '{"video": 0}', "--enable-scale-out", "--disable-uvicorn-access-log", "--disable-log-stats"]
    argv += ["--middleware", f"{RequireKey.__module__}.{RequireKey.__qualname__}"]
    if cpu:
        # The class by its path: under the name "uni" vLLM would replace it, on CPU, by one more process.
        argv += ["--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"]
        argv += ["--enforce-eager", "--kv-cache-memory-bytes", str((engine.kv_cache_mib or KV_CACHE_MIB) << 20)]
        # A prompt whose prefill is cut in two, and whose request has a seed, ends vLLM 0.32 on CPU ("CPU Generator does not use offset").
        argv += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(BATCHED_TOKENS, engine.max_model_len))]
    else:
        argv += ["--tensor-parallel-size", str(engine.tensor_parallel), "--gpu-memory-utilization", str(engine.gpu_share)]
        argv += ["--enforce-eager"] * engine.enforce_eager
        argv += ["--kv-cache-memory-bytes", str(engine.kv_cache_mib << 20)] if engine.kv_cache_mib else []
    if spec.updatable:
        argv += ["--weight-transfer-config", '{"backend": "mmopd_file"}']
    env = {"VLLM_SERVER_DEV_MODE": "1"} if spec.updatable else {}
    return Server(name=spec.name, model=str(spec.model), argv=[*argv, *engine.extra_args], log=str(log_of(logs, spec.name)), env=env)


def _assign_gpus(specs: Sequence[ServerSpec], servers: Sequence[Server]) -> None:
    """GPUs for each server, from the last one down: training ranks take theirs from the first one up. [not run]"""
    free, total = 0, torch.cuda.device_count()
    for spec, server in zip(specs, servers, strict=True):
        devices = [(total - 1 - free - i) % total for i in range(spec.engine.tensor_parallel)]
        free += len(devices)
        server["env"]["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))


def _start(group: list[Server], children: Children, logs: Path, key: str) -> Child:
    name = group[0]["name"] if len(group) == 1 else "servers"
    env = {**ENV, **({} if torch.cuda.is_available() else CPU_ENV), KEY_VARIABLE: key}
    return children.start(name, [sys.executable, "-m", "mmopd.teacher.vllm_main", json.dumps(group)], log_of(logs, name), env)


def _await_ready(servers: Servers, on_event: Callable[[str, str], None], deadline: float) -> None:
    """Probe until every server is healthy and lists its model."""
    begin, waiting = time.monotonic(), dict(servers)
    for name in waiting:
        on_event(name, "starting")
    with httpx.Client(timeout=5.0) as client:
        while waiting:
            servers.check()
            for name in [name for name, endpoint in waiting.items() if _ready(client, endpoint)]:
                del waiting[name]
                on_event(name, f"ready after {time.monotonic() - begin:.1f} s")
            if waiting and time.monotonic() > deadline:
                name = next(iter(waiting))
                raise UserError(f"server {name!r} is not ready in time; the last lines of its log:\n{_last_words(servers.log(name))}")
            time.sleep(0.1)


def _ready(client: httpx.Client, endpoint: Endpoint) -> bool:
    try:
        if client.get(f"{endpoint.url}/health", headers=endpoint.headers).status_code != 200:
            return False
        models = client.get(f"{endpoint.url}/v1/models", headers=endpoint.headers).json()
        return endpoint.model in [model["id"] for model in models["data"]]
    except (httpx.HTTPError, KeyError, ValueError):
        return False


def _last_words(log: Path) -> str:
    """The last lines of a log without the frames of tracebacks: vLLM prints dozens after the one that says the cause."""
    if not log.is_file():
        return "(there is no log)"
    lines = [_LOG_PREFIX.sub("", line) for line in log.read_text(errors="replace").splitlines()]
    said = [line for line in lines if line.strip() and not line.startswith((" ", "Traceback"))]
    return "\n".join(list(dict.fromkeys(said))[-LAST_LINES:])
