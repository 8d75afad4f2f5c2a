"""vLLM servers for the teachers and the student: start them together, watch them, stop them together.

They listen on free ports, on the loopback interface by default. The API key is passed through the environment.
Supervisors (`mmopd.serving.supervisor`) run the servers and restart a teacher that dies. On CPU one supervisor, which
has imported vLLM once, runs all servers; on GPU each server has its own supervisor.
"""

import json
import logging
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from mmopd.errors import CheckpointError, ConfigError, ServerError
from mmopd.model_folder import CHECK_VARIABLE, refuse_code
from mmopd.runtime import python
from mmopd.runtime.causes import why
from mmopd.runtime.http import client
from mmopd.runtime.logs import message_of
from mmopd.runtime.network import HOST, local, socket_place
from mmopd.runtime.processes import Children, stop
from mmopd.runtime.progress import Stages
from mmopd.serving.adapted_model import check_adapters
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.placement import assign_gpus, check_memory
from mmopd.serving.readiness import Awaited
from mmopd.serving.specs import ServerSpec, to_server
from mmopd.serving.supervisor import KEY_VARIABLE, READY, SOCKETS_VARIABLE, Server

logger = logging.getLogger(__name__)

TIMEOUT = 1800.0  # seconds for which a server that is not ready may log nothing; large checkpoints take minutes
SOCKET_NAME = len("/mmopd-xxxxxxxx/") + 36  # bytes; vLLM names a socket by a UUID
_PID = re.compile(r"supervisor: (\d+)")
_SAID = re.compile(r"server (?P<what>restarted|ended): (?P<name>.+) \(status (?P<status>-?\d+)\)")

CPU_ENV = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # with binding, all servers would share core 0
    "TORCHDYNAMO_DISABLE": "1",  # avoids a C++ compiler at run time and a stall at the first request
}
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",  # keeps traffic between the processes of one server on this machine
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",
    CHECK_VARIABLE: "1",
}
OnEvent = Callable[[str, str], None]  # server's name, what happened


class Servers(dict[str, Endpoint]):
    """Endpoints by name, and the processes that serve them.

    Attributes:
        restarts: number of restarts of each server, by its name.
        gpus: GPUs of each endpoint, by its name, such as `3,2`; empty on CPU.
    """

    def __init__(
        self, endpoints: Mapping[str, Sequence[Endpoint]], gpus: Mapping[str, str], logs: Path, on_event: OnEvent
    ) -> None:
        super().__init__({endpoint.name: endpoint for group in endpoints.values() for endpoint in group})
        self.restarts: Counter[str] = Counter()
        self.gpus = gpus
        self._endpoints = endpoints
        self._logs = logs
        self._on_event = on_event
        self._supervisors: list[_Supervisor] = []
        self._away: dict[str, Awaited] = {}  # servers that do not answer yet, by name
        self._begin: dict[str, int] = {}  # bytes of each server's log that are from earlier starts
        self._http = client(timeout=5.0)

    def start(self, groups: Sequence[list[Server]], children: Children, key: str, preload: bool) -> None:
        """Start a supervisor for each group of servers."""
        for group in groups:
            self._supervisors.append(_Supervisor(group, children, self._logs, key, preload))

    def await_ready(self, timeout: float) -> None:
        """Wait until every server answers; a server that dies later is restarted.

        Args:
            timeout: seconds for which a server may log nothing.

        Raises:
            ServerError: a server has ended, or neither answers nor logs anything; the message has its error or the
                last lines of its log.
        """
        for name in self._endpoints:
            self._await(name)
            self._on_event(name, "starting")
        shown: dict[str, str] = {}
        while True:
            self.check()
            if not self._away:
                break
            for name, away in self._away.items():
                if (does := away.read_log()) != shown.get(name):
                    shown[name] = does
                    self._on_event(name, does)
                if (silent := time.monotonic() - away.heard) > timeout:
                    raise ServerError(
                        f"server {name!r} is not ready, and its log has not grown for {silent:.0f} s ({away.reason}); "
                        f"{why(self.log(name), away.begin, by_signal=True)}"
                    )
            time.sleep(0.1)
        for supervisor in self._supervisors:
            supervisor.all_ready()

    def check(self) -> None:
        """Process the events since the last call; on return every server runs or is being restarted.

        Raises:
            ServerError: a server has ended permanently, or says that it is ready and cannot be reached; the message has
                its error or the last lines of its log, or the reason.
        """
        for supervisor in self._supervisors:
            status = supervisor.child.returncode  # read first, so that the log is complete
            for said in supervisor.hear():
                self._heed(said["what"], said["name"], said["status"])
            if status is not None:
                raise self._lost(supervisor.child.name, status, supervisor.child.log, supervisor.child.begin)
        for name, away in list(self._away.items()):
            away.read_log()
            if away.ready(self._http):
                self._on_event(name, f"ready after {time.monotonic() - self._away.pop(name).since:.1f} s")
            elif away.unreachable():
                raise ServerError(
                    f"server {name!r} says in {self.log(name)} that it is ready, but cannot be reached: {away.reason}"
                )

    def stop(self) -> None:
        """End all servers in parallel; on return none of their processes is left."""
        self._http.close()
        stop([supervisor.child for supervisor in self._supervisors])
        for supervisor in self._supervisors:
            supervisor.close()

    def log(self, server: str) -> Path:
        """Return the log file of a server."""
        return log_of(self._logs, server)

    def _await(self, name: str) -> None:
        self._away[name] = Awaited(self._endpoints[name], self.log(name))
        self._begin[name] = self._away[name].begin

    def _heed(self, what: str, name: str, status: str) -> None:
        if what == "ended":
            raise self._lost(name, int(status), self.log(name), self._begin.get(name, 0))
        self.restarts[name] += 1
        self._await(name)
        logger.warning("server %s ended with status %s and is being restarted", name, status)
        self._on_event(name, f"ended with status {status}, started again")

    def _lost(self, name: str, status: int, log: Path, begin: int) -> ServerError:
        again = f", after {self.restarts[name]} restarts" if self.restarts[name] else ""
        killed = status < 0 or status > 128
        return ServerError(f"server {name!r} ended with status {status}{again}; {why(log, begin, by_signal=killed)}")


class _Supervisor:
    """The process that supervises one or more servers, and the messages in its log."""

    def __init__(self, group: list[Server], children: Children, logs: Path, key: str, preload: bool) -> None:
        name = "servers" if preload else f"{group[0]['name']}.supervisor"
        flags = ["--preload"] * preload
        command = python.command("-m", "mmopd.serving.supervisor", *flags, json.dumps(group))
        log = log_of(logs, name)
        self._heard = log.stat().st_size if log.is_file() else 0  # bytes; skips the messages of an earlier run
        self._pid: int | None = None
        env = {**ENV, **(CPU_ENV if preload else {}), **shared_env(group), KEY_VARIABLE: key}
        # vLLM leaves its sockets behind, even after an orderly stop. The supervisor removes their folder when it
        # stops them; if it was killed, `close` does.
        self._sockets = tempfile.mkdtemp(prefix="mmopd-", dir=socket_place(SOCKET_NAME))
        self.child = children.start(name, command, log, env | {SOCKETS_VARIABLE: self._sockets})

    def close(self) -> None:
        """Remove the sockets of the servers, which have ended."""
        shutil.rmtree(self._sockets, ignore_errors=True)

    def hear(self) -> list[re.Match[str]]:
        """Return the messages about its servers since the last call."""
        with self.child.log.open("rb") as file:
            file.seek(self._heard)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._heard += len(whole + newline)
        lines = [message_of(line) for line in whole.decode(errors="replace").splitlines()]
        self._pid = next((int(found[1]) for line in lines if (found := _PID.fullmatch(line))), self._pid)
        return [found for line in lines if (found := _SAID.fullmatch(line))]

    def all_ready(self) -> None:
        """Tell the supervisor that from now on a death does not count as a failed start."""
        if self._pid is None:
            raise RuntimeError(f"{self.child.log}: no line with the supervisor's process id")
        os.kill(self._pid, READY)


def shared_env(group: Sequence[Server]) -> dict[str, str]:
    """Return the variables that all servers of a supervisor have alike.

    The supervisor has them from its own start, so that they hold for what it imports before it forks the servers.
    """
    return dict(set.intersection(*(set(server["env"].items()) for server in group)))


def log_of(logs: Path, name: str) -> Path:
    """Return the log file of a server."""
    return logs / f"{name}.log"


@contextmanager
def serve(
    specs: Sequence[ServerSpec],
    children: Children,
    logs: Path,
    on_event: OnEvent,
    timeout: float = TIMEOUT,
    *,
    host: str = HOST,
    key: str | None = None,
) -> Iterator[Servers]:
    """Start all servers in parallel, yield their endpoints when all are ready, and stop them at the end.

    Args:
        specs: servers; all names, also those of their endpoints, must differ.
        children: owner of the processes.
        logs: folder for one log per server and one per supervisor.
        on_event: called with the server's name and what happened, for a display; after the start it is called from
            `Servers.check`.
        timeout: seconds for which a server that is not ready may log nothing.
        host: address that the servers listen on.
        key: the API key; a new one by default.

    Raises:
        CheckpointError: a model folder is missing or names code to run, or an adapter does not fit its model.
        ServerError: a port is taken, memory is short, or a server ended or hangs during its start.
    """
    import torch  # takes seconds, and `mmopd plan` only places servers

    cpu = not torch.cuda.is_available()
    for spec in specs:
        if not (spec.model / "config.json").is_file():
            raise CheckpointError(f"{spec.model}: cannot serve it as {spec.name!r}: the folder has no config.json")
        refuse_code(spec.model)
        if cpu and spec.sync == "ipc":
            raise ConfigError("student.sync: `ipc` shares a GPU, and this machine has none; remove the key")
        if spec.adapters:
            check_adapters(spec.adapters, spec.model, cpu=cpu)
    if cpu:
        check_memory(specs)
    key = key or secrets.token_urlsafe(32)
    gpus = dict.fromkeys((spec.name for spec in specs), "") if cpu else assign_gpus(specs)
    with ExitStack() as ports:
        reserved = {spec.name: ports.enter_context(_reserve(spec, host)) for spec in specs}
        to_run = [
            to_server(spec, (host, reserved[spec.name]), log_of(logs, spec.name), gpus[spec.name]) for spec in specs
        ]
        endpoints = {
            spec.name: [
                Endpoint(
                    name,
                    f"http://{local(host)}:{reserved[spec.name]}",
                    name,
                    key,
                    "student" if spec.updatable else "teacher",
                )
                for name in spec.served
            ]
            for spec in specs
        }
        servers = Servers(endpoints, {name: gpus[spec.name] for spec in specs for name in spec.served}, logs, on_event)
        try:
            servers.start([to_run] if cpu else [[server] for server in to_run], children, key, preload=cpu)
            servers.await_ready(timeout)
            yield servers
        finally:
            servers.stop()


@contextmanager
def serve_in_stage(
    specs: Sequence[ServerSpec],
    children: Children,
    logs: Path,
    stages: Stages,
    *,
    host: str = HOST,
    key: str | None = None,
) -> Iterator[Servers]:
    """Run `serve`: show the start as a stage, and later events as lines."""
    with ExitStack() as stack:
        with stages.stage("serve") as stage:
            stage.total(len(specs))
            stage.outcome = f"{len(specs)} vLLM servers"
            up = False
            starting: dict[str, str] = {}

            def show(name: str, what: str) -> None:
                stages.servers[name] = what
                if up:
                    stages.console.print(f"{datetime.now():%H:%M:%S} {name}: {what}", markup=False, highlight=False)
                    return
                if what.startswith("ready"):
                    starting.pop(name, None)
                    stage.advance()
                else:
                    starting[name] = what
                stage.note("\n".join(f"{one}: {does}" for one, does in starting.items()))

            servers = stack.enter_context(serve(specs, children, logs, show, host=host, key=key))
            up = True
        yield servers


@contextmanager
def _reserve(spec: ServerSpec, host: str) -> Iterator[int]:
    """Reserve a port: bind it without listening.

    Nobody else is given the port, but the server (which also sets SO_REUSEADDR) can take it, also after a restart.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((host, spec.engine.port or 0))
        except socket.gaierror as error:
            raise ServerError(f"--host {host}: not an address of this machine ({error.strerror})") from None
        except OSError as error:
            port = f"port {spec.engine.port}" if spec.engine.port else "a port"
            raise ServerError(
                f"{port} on {host} for server {spec.name!r} cannot be used ({error.strerror}): "
                "set engine.port to another port, or remove it to use a free one"
            ) from None
        yield int(held.getsockname()[1])
