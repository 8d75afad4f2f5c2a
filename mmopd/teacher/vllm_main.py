"""Runs vLLM's API server: `python -m mmopd.teacher.vllm_main SERVERS`, with SERVERS a JSON list of `Server`.

On GPU one server, in this process. On CPU any number, which share one import of vLLM: it is most of a small server's
start-up time and memory, so it is done once, each server is forked from here, and forks its engine in turn. The first
server that ends takes the others with it.

This calls the API server's module, because the `vllm` command of the CPU wheel cannot find its own version.
"""

import gc
import hmac
import json
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict

KEY_VARIABLE = "VLLM_API_KEY"


class Server(TypedDict):
    """One server to run."""

    name: str
    model: str  # HF folder
    argv: list[str]  # vLLM's own arguments
    log: str  # file that its output is appended to
    env: dict[str, str]  # added to the environment


class RequireKey:
    """ASGI middleware: no route without the API key; vLLM leaves those that pause, update and call into the engine open."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ[KEY_VARIABLE]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Awaitable[None]]) -> None:
        """Answer 401, or pass on."""
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["type"] == "lifespan" or hmac.compare_digest(given, self._expected):
            return await self._app(scope, receive, send)
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})
        return None


def preload(models: set[Path]) -> None:
    """Import, once, all that a CPU server needs, and let engines be forked.

    On CPU vLLM spawns them, to give each its own OpenMP settings; here the settings are the same everywhere.
    """
    import vllm.entrypoints.launchers.api_server.routers
    import vllm.v1.engine.async_llm
    import vllm.v1.engine.utils
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_worker
    from vllm import ModelRegistry

    context = multiprocessing.get_context("fork")
    vllm.v1.engine.utils.get_mp_context = lambda: context  # type: ignore[attr-defined]
    for architecture in {a for model in models for a in json.loads((model / "config.json").read_text())["architectures"]}:
        lazy = ModelRegistry.models.get(architecture)
        if lazy is not None:  # otherwise each server would inspect the class in a process of its own, with imports of its own
            ModelRegistry.register_model(architecture, lazy.load_model_cls())
    gc.collect()
    gc.freeze()  # a collection would write to, and so copy, the pages that the servers share


def run(server: Server) -> None:
    """Serve until told to stop, in this process."""
    from vllm.entrypoints.launchers.api_server import entry

    output = os.open(server["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(server["env"])
    sys.argv = ["vllm", *server["argv"]]
    entry.main()  # type: ignore[no-untyped-call]


def run_all(servers: list[Server]) -> int:
    """Fork each server; the exit status of the first that ends, named on the last line of this process's output."""
    names: dict[int, str] = {}
    for server in servers:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                run(server)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        names[pid] = server["name"]

    def stop(number: int, frame: FrameType | None) -> None:
        for pid in names:
            os.kill(pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    first = None
    while names:
        pid, code = os.wait()
        name = names.pop(pid)
        if first is None:
            first = os.waitstatus_to_exitcode(code)
            print(ended(name), flush=True)
            stop(signal.SIGTERM, None)
    return first if first is not None and first >= 0 else 1


def ended(name: str) -> str:
    """The line that says which server ended first."""
    return f"server ended: {name}"


def main(servers: list[Server]) -> int:
    """Serve until told to stop; the exit status."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        preload({Path(server["model"]) for server in servers})
        return run_all(servers)
    (server,) = servers
    run(server)
    return 0


if __name__ == "__main__":
    exit_status = main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(exit_status)  # no teardown of the libraries: it is noisy, and would bury the last words of a failed start
