"""Run vLLM's API servers and keep them running.

Usage: `python -m mmopd.serving.supervisor [--preload] SERVERS`, where SERVERS is a JSON list of `Server`.

This process is the supervisor. It forks each server, and each server forks its engine. With `--preload` (on CPU) the
supervisor imports vLLM first, once for all servers: the import is most of a small server's start-up time and memory.
Without it (on GPU, one supervisor for each server) it loads only the standard library, since a process that has touched
CUDA cannot be forked. Not run on a GPU.

Until the launcher reports that all servers are ready (SIGUSR1), the first server that ends stops the others. After
that, a server that ends is restarted on the same port, up to RESTARTS times within WINDOW. The log of this process
reports events in lines that the launcher reads (`started`, `restarted`, `ended`).

The API server's module is called directly, because the `vllm` command of the CPU wheel cannot find its own version.
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
import shutil
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
SOCKETS_VARIABLE = "VLLM_RPC_BASE_PATH"  # the folder of the sockets between vLLM's processes
RESTARTS = 3  # restarts of one server within WINDOW; one more death is permanent
WINDOW = 600.0  # seconds
READY = signal.SIGUSR1
_HANDLED = frozenset({signal.SIGTERM, signal.SIGCHLD, READY})


class Server(TypedDict):
    """A server to run."""

    name: str
    model: str  # HF folder
    argv: list[str]  # vLLM's own arguments
    log: str  # file to which its output is appended
    env: dict[str, str]  # added to the environment


class RequireKey:
    """ASGI middleware that requires the API key on every route; vLLM leaves the routes that pause, update and call into
    the engine open.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ[KEY_VARIABLE]}".encode()

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Awaitable[None]]
    ) -> None:
        """Pass the request on, or answer 401 without the key."""
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["type"] == "lifespan" or hmac.compare_digest(given, self._expected):
            return await self._app(scope, receive, send)
        # The connection is closed, so that nobody without the key can go on to send a body.
        headers = [(b"content-length", b"0"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        return None


def preload(models: set[Path]) -> None:
    """Import all that a CPU server needs once, and make vLLM fork its engines.

    On CPU vLLM spawns engines to give each its own OpenMP settings; here the settings are the same for all.
    """
    import vllm.entrypoints.launchers.api_server.routers  # noqa: F401
    import vllm.v1.engine.async_llm  # noqa: F401
    import vllm.v1.engine.utils
    import vllm.v1.executor.uniproc_executor  # noqa: F401
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm import ModelRegistry

    context = multiprocessing.get_context("fork")
    vllm.v1.engine.utils.get_mp_context = lambda: context  # type: ignore[attr-defined]
    for architecture in {
        a for model in models for a in json.loads((model / "config.json").read_text(encoding="utf-8"))["architectures"]
    }:
        lazy = ModelRegistry.models.get(architecture)
        # Otherwise each server would inspect the class in a new process, which imports everything again.
        if lazy is not None:
            ModelRegistry.register_model(architecture, lazy.load_model_cls())
    gc.collect()
    gc.freeze()  # a collection would write to the pages that the servers share, and so copy them


def run(server: Server) -> None:
    """Serve in this process until told to stop."""
    output = os.open(server["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    logs.start(server["name"])
    os.environ.update(server["env"])
    import uvicorn
    from vllm.entrypoints.launchers.api_server import entry

    from mmopd.serving import guarded_http

    uvicorn.Config.__init__ = functools.partialmethod(uvicorn.Config.__init__, **guarded_http.settings())  # type: ignore
    sys.argv = ["vllm", *server["argv"]]
    entry.main()  # type: ignore[no-untyped-call]


@dataclass(slots=True)
class _Running:
    """A server under supervision."""

    server: Server
    pid: int | None = None  # None between its death and its next start
    start_at: float = 0.0  # time of that next start, on the monotonic clock
    deaths: list[float] = field(default_factory=list)  # times of the deaths within WINDOW
    status: int = 0  # exit status of the last death


class Supervisor:
    """Forks servers, restarts those that die, and ends all of them together."""

    def __init__(self, servers: list[Server]) -> None:
        self._running = [_Running(server) for server in servers]
        self._ready = self._stopping = False
        self._status = 0  # exit status of the server that ended the others

    def run(self) -> int:
        """Supervise until all servers have ended; return the exit status of the first that ended permanently."""
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
        # Open connections last. Later there may be no time: if the launcher was killed, this process is killed soon.
        shutil.rmtree(os.environ[SOCKETS_VARIABLE], ignore_errors=True)

    def _bury(self) -> None:
        """Record every server that has ended: schedule its restart, or stop all."""
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
    """Run a server in a new process group; return its process id."""
    # A stop signal that arrives now waits until the child handles it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
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
        signal.signal(READY, signal.SIG_IGN)  # as in every other child
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        run(server)
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)  # skips the teardown of the libraries, whose output would hide the cause of a failed start


def _reap(pid: int) -> int | None:
    """Return the exit status of a server that has ended, after all its child processes are gone; None while it runs.

    A server that was killed leaves its engine, which holds the memory and the port, so that the next server could not
    start.
    """
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # before waitpid, while the number still means this group
    _, code = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        for _ in range(500):  # up to 5 s, until the guard above (`runtime.processes`) has reaped the others
            os.killpg(pid, 0)
            time.sleep(0.01)
    return os.waitstatus_to_exitcode(code)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: the wake-up pipe tells the supervisor."""


def say(line: str) -> None:
    """Log a line that the launcher reads."""
    logger.info(line)


def started(pid: int) -> str:
    """Return the line with the process id to which the launcher sends its signal."""
    return f"supervisor: {pid}"


def restarted(name: str, status: int) -> str:
    """Return the line for a restart, with the status of the last end (negative for a signal)."""
    return f"server restarted: {name} (status {status})"


def ended(name: str, status: int) -> str:
    """Return the line for the first server that ended permanently."""
    return f"server ended: {name} (status {status})"


def main(arguments: list[str]) -> int:
    """Serve until told to stop; return the exit status."""
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
