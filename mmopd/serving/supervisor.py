"""Runs vLLM's API servers and keeps them running: `python -m mmopd.serving.supervisor [--preload] SERVERS`, SERVERS a
JSON list of `Server`.

This process is the supervisor: each server is forked from it, and forks its engine in turn. With `--preload` (on CPU)
it has imported vLLM first, once for all: that is most of a small server's start-up time and memory. Without it (on GPU,
one supervisor for each server) it loads the standard library only, since a process that has touched CUDA cannot be
forked. [not run on GPU]

Until the launcher says that all are ready (SIGUSR1), the first server that ends takes the others with it. After that
one that may be restarted is, on the same port, and this process's log says what happens in lines that the launcher
reads (`started`, `restarted`, `ended`).

This calls the API server's module, because the `vllm` command of the CPU wheel cannot find its own version.
"""

import contextlib
import functools
import gc
import hmac
import json
import logging
import multiprocessing
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict

from mmopd.runtime import logs

logger = logging.getLogger("mmopd.serving.supervisor")

KEY_VARIABLE = "VLLM_API_KEY"
RESTARTS = 3  # of one server within WINDOW; one more death, and it is given up
WINDOW = 600.0  # seconds
CLOSING = 5  # seconds that an API server has for what it has begun, once it is to end
READY = signal.SIGUSR1
_HANDLED = frozenset({signal.SIGTERM, signal.SIGCHLD, READY})


class Server(TypedDict):
    """One server to run."""

    name: str
    model: str  # HF folder
    argv: list[str]  # vLLM's own arguments
    log: str  # file that its output is appended to
    env: dict[str, str]  # added to the environment


class RequireKey:
    """ASGI middleware: no route without the API key; vLLM leaves those that pause, update and call into the engine
    open.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ[KEY_VARIABLE]}".encode()

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Awaitable[None]]
    ) -> None:
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
    for architecture in {
        a for model in models for a in json.loads((model / "config.json").read_text())["architectures"]
    }:
        lazy = ModelRegistry.models.get(architecture)
        if (
            lazy is not None
        ):  # otherwise each server would inspect the class in a process of its own, with imports of its own
            ModelRegistry.register_model(architecture, lazy.load_model_cls())
    gc.collect()
    gc.freeze()  # a collection would write to, and so copy, the pages that the servers share


def run(server: Server) -> None:
    """Serve until told to stop, in this process."""
    output = os.open(server["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    logs.start(server["name"])
    os.environ.update(server["env"])
    import uvicorn
    from vllm.entrypoints.launchers.api_server import entry

    # An engine that dies leaves a call into it (a pause, new weights) without an answer, for which its API server would
    # wait for ever.
    uvicorn.Config.__init__ = functools.partialmethod(uvicorn.Config.__init__, timeout_graceful_shutdown=CLOSING)  # type: ignore
    sys.argv = ["vllm", *server["argv"]]
    entry.main()  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class _Running:
    """One server under supervision."""

    server: Server
    pid: int | None = None  # None between its death and its next start
    start_at: float = 0.0  # then: when that is, on the monotonic clock
    deaths: list[float] = field(default_factory=list)  # times of those within WINDOW
    status: int = 0  # of the last death


class Supervisor:
    """Forks servers, starts again what dies, and ends all of them together."""

    def __init__(self, servers: list[Server]) -> None:
        self._running = [_Running(server) for server in servers]
        self._ready = self._stopping = False
        self._status = 0  # of the server that ended the others

    def run(self) -> int:
        """Until all have ended; the exit status of the first that ended for good."""
        wake, notify = os.pipe()
        os.set_blocking(notify, False)
        signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
        for number in _HANDLED:
            signal.signal(number, _ignore)
        say(started(os.getpid()))
        for one in self._running:
            one.pid = _fork(one.server)
        while any(one.pid is not None for one in self._running) or not self._stopping:
            starts = [one.start_at for one in self._running if one.pid is None]
            wait = max(0.0, min(starts) - time.monotonic()) if starts and not self._stopping else None
            received = os.read(wake, 4096) if select.select([wake], [], [], wait)[0] else b""
            self._ready |= READY in received
            if signal.SIGTERM in received:
                self._stop()
            self._bury()
            self._start_again()
        return self._status

    def _stop(self) -> None:
        self._stopping = True
        for one in self._running:
            if one.pid is not None:
                os.kill(one.pid, signal.SIGTERM)

    def _bury(self) -> None:
        """Note every server that has ended, and decide what follows."""
        for one in self._running:
            if one.pid is None or (status := _reap(one.pid)) is None:
                continue
            one.pid = None
            one.status = status
            now = time.monotonic()
            if self._stopping:
                continue
            one.deaths = [death for death in one.deaths if now - death < WINDOW] + [now]
            if self._ready and len(one.deaths) <= RESTARTS:
                one.start_at = now + 2 ** (len(one.deaths) - 1)
                continue
            self._status = status if status > 0 else 1
            say(ended(one.server["name"], status))
            self._stop()

    def _start_again(self) -> None:
        for one in self._running:
            if one.pid is None and not self._stopping and one.start_at <= time.monotonic():
                one.pid = _fork(one.server)
                say(restarted(one.server["name"], one.status))


def _fork(server: Server) -> int:
    """Run a server in a process group of its own; its process id."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)  # a stop that arrives now waits until the child can hear it
    sys.stdout.flush()
    pid = os.fork()
    if pid != 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        return pid
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in _HANDLED:
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        run(server)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)  # no teardown of the libraries: it is noisy, and would bury the last words of a failed start


def _reap(pid: int) -> int | None:
    """The exit status of a server that has ended, with all that it started gone too; None while it runs.

    A server that was killed leaves its engine, which holds the memory and the port: the next one could not start.
    """
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # before it is buried, so that its number still means this group
    _, code = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        for _ in range(500):  # 5 s, until the guard above has buried the others
            os.killpg(pid, 0)
            time.sleep(0.01)
    return os.waitstatus_to_exitcode(code)


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler that does nothing: the wake-up pipe tells the supervisor."""


def say(line: str) -> None:
    """A line of this process's log, which the launcher reads."""
    logger.info(line)


def started(pid: int) -> str:
    """The line that says where the launcher's signal goes to."""
    return f"supervisor: {pid}"


def restarted(name: str, status: int) -> str:
    """The line that says that a server is started again, and how it had ended (a signal is negative)."""
    return f"server restarted: {name} (status {status})"


def ended(name: str, status: int) -> str:
    """The line that says which server ended for good, first of all."""
    return f"server ended: {name} (status {status})"


def main(arguments: list[str]) -> int:
    """Serve until told to stop; the exit status."""
    *flags, encoded = arguments
    servers: list[Server] = json.loads(encoded)
    logs.start("servers" if len(servers) > 1 else f"{servers[0]['name']}.supervisor")
    if flags == ["--preload"]:
        preload({Path(server["model"]) for server in servers})
    return Supervisor(servers).run()


if __name__ == "__main__":
    exit_status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(exit_status)
