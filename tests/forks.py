"""Processes for tests, forked from one that has imported vLLM, or torch and DeepSpeed; see `forking`.

These imports take most of the CPU time of a server or a rank whose model is tiny. All pytest processes of a session,
and the launchers that they start so, share one forking process for servers and one for the rest. A process whose
environment differs in a variable that is read during an import is started as usual.
"""

import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forking

from mmopd.runtime import processes, python
from mmopd.runtime.network import free_port
from mmopd.serving.servers import CPU_ENV, ENV

ENVIRONMENTS = {
    "servers": {**ENV, **CPU_ENV},
    "ranks": {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
}
MODULES = {
    "mmopd.serving.supervisor": "servers",
    "mmopd": "ranks",
    "mmopd.train.rank": "ranks",
    "mmopd.train.export_rank": "ranks",
}
# The environment of forking processes without what a single test or server sets
PLAIN = {k: v for k, v in os.environ.items() if k not in forking.READ_LATE and not k.startswith("PYTEST_")}
session = (  # the pytest process that the user has started
    os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
)


class Forked:
    """A process that was forked, with the methods of `subprocess.Popen` that are used.

    Args:
        arguments: what would follow `python -m`.
        env: the whole environment.
        streams: file descriptors of its standard streams.
        folder: its current folder.
        guarded_by: the process with which it ends, if it has guards.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str],
        streams: Sequence[int],
        folder: Path | None = None,
        guarded_by: int | None = None,
    ) -> None:
        self.returncode: int | None = None
        request = {
            "arguments": list(arguments),
            "env": dict(env),
            "folder": str(folder or Path.cwd()),
            "guarded_by": guarded_by,
        }
        self._answers = connect(MODULES.get(arguments[0], "ranks"))
        socket.send_fds(self._answers, [json.dumps(request).encode()], list(streams))
        self.pid = int(self._answers.recv(64))
        if not self.pid:
            self._answers.close()

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.returncode = int(self._answers.recv(64) or -signal.SIGKILL)
            self._answers.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit status."""
        if self.returncode is None and not select.select([self._answers], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def start_ranks(worker: str, arguments: Sequence[str], size: int, log: str, **env: str) -> list[Forked]:
    """Start `size` ranks that call the `main` of a worker; {rank} in `log` becomes the number of the rank."""
    env |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(size):
        one = os.environ | ENVIRONMENTS["ranks"] | env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with Path(os.devnull).open("rb") as nothing, Path(log.format(rank=rank)).open("wb") as out:
            ranks.append(Forked([worker, *arguments], one, [nothing.fileno(), out.fileno(), out.fileno()]))
    return ranks


def connect(kind: str) -> socket.socket:
    """Return a connection to the forking process of a kind; start it if there is none."""
    name = f"mmopd-tests-{os.getuid()}-{session}-{kind}"
    process = None
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(f"\0{name}")
            return connection
        except ConnectionRefusedError:
            connection.close()
        if process is None:
            process = _start(kind, name)
        time.sleep(0.05)


def _start(kind: str, name: str) -> "subprocess.Popen[bytes]":
    env = PLAIN | python.environment() | ENVIRONMENTS[kind] | {forking.PADDING: " " * forking.ROOM}
    command = python.command(forking.__file__, kind, name, str(session), " " * forking.ROOM)
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, start_new_session=True)


def popen(guard: list[str], **settings: Any) -> "subprocess.Popen[bytes] | Forked":
    """Start a child of `runtime.processes` and its guards: as a fork, if that is possible."""
    arguments = guard[8:]  # after `python -I -S FILE PARENT` and `python -P -m`
    wanted = MODULES.get(arguments[0]) if guard[5:8] == python.command("-m") and arguments else None
    if wanted == "ranks" or (wanted == "servers" and "--preload" in arguments):
        with Path(os.devnull).open("rb") as nothing:
            out = settings["stdout"].fileno()
            fork = Forked(arguments, settings["env"], [nothing.fileno(), out, out], guarded_by=os.getpid())
        if fork.pid:
            return fork
    return subprocess.Popen(guard, **settings)


def install() -> None:
    """Fork the servers and ranks that this process starts from now on."""
    processes.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=popen, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )
