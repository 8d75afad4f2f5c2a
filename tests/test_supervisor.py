"""Restarts of dead servers, with a vLLM that starts immediately; everything else is real."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from fake_package import fake_model, install
from waiting import LIMIT, wait_for

from mmopd.config import Engine
from mmopd.errors import UserError
from mmopd.runtime.processes import Children
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.servers import Servers, serve
from mmopd.serving.specs import ServerSpec

pytestmark = pytest.mark.usefixtures("server")
Event = tuple[str, str]


@pytest.fixture(params=["one supervisor", "one each"])
def specs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ServerSpec]:
    """Return a student and a teacher, under one supervisor as on CPU, or with one each as on GPU."""
    monkeypatch.setenv("PYTHONPATH", install(tmp_path))
    if request.param == "one each":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    models = [fake_model(tmp_path / name) for name in ("student", "teacher")]
    return [ServerSpec(model.name, model, Engine(), updatable=model.name == "student") for model in models]


@contextmanager
def running(specs: list[ServerSpec], logs: Path) -> Iterator[tuple[Servers, list[Event]]]:
    events: list[Event] = []
    with Children() as children:
        with serve(specs, children, logs, lambda *event: events.append(event), timeout=LIMIT) as servers:
            yield servers, events
        assert not any(child.alive for child in children)


def pids(endpoint: Endpoint) -> dict[str, int]:
    found: dict[str, int] = httpx.get(f"{endpoint.url}/pids", headers=endpoint.headers).json()
    return found


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(endpoint: Endpoint) -> list[int]:
    """Kill the API server alone. Returns its process id, and that of its engine."""
    found = pids(endpoint)
    os.kill(found["server"], signal.SIGKILL)
    return list(found.values())


def restart(servers: Servers, events: list[Event]) -> list[int]:
    """Kill the teacher, and wait until it is back. Returns the process ids that it had."""
    times = servers.restarts["teacher"] + 1
    found = kill(servers["teacher"])

    def back() -> bool:
        servers.check()
        return servers.restarts["teacher"] == times and events[-1][1].startswith("ready")

    wait_for(back)
    return found


def look(servers: Servers) -> bool:
    """Check the servers until that raises."""
    servers.check()
    return False


def test_a_dead_teacher_is_back_on_its_port_and_nothing_of_the_old_one_is_left(
    specs: list[ServerSpec], tmp_path: Path
) -> None:
    with running(specs, tmp_path) as (servers, events):
        student = list(pids(servers["student"]).values())
        before = restart(servers, events)
        after = list(pids(servers["teacher"]).values())  # at the same URL, with the same key
        assert not any(map(runs, before))
        assert set(before).isdisjoint(after)
        assert list(pids(servers["student"]).values()) == student
        assert servers.restarts == {"teacher": 1}
        assert ("teacher", "ended with status -9, started again") in events
    assert not any(map(runs, (*after, *student)))


def test_a_death_before_all_are_ready_is_the_end(specs: list[ServerSpec], tmp_path: Path) -> None:
    (tmp_path / "teacher" / "crash").touch()
    with (
        pytest.raises(UserError, match=r"(?s)server 'teacher' ended with status 1; .*the weights are broken"),
        running(specs, tmp_path),
    ):
        pass


def test_a_server_that_keeps_dying_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", install(tmp_path))
    spec = ServerSpec("teacher", fake_model(tmp_path / "teacher"), Engine(), updatable=False)
    with running([spec], tmp_path) as (servers, events):
        begin = time.monotonic()
        for _ in range(3):
            restart(servers, events)
        assert time.monotonic() - begin > 1 + 2 + 4  # each wait is longer
        kill(servers["teacher"])
        with pytest.raises(UserError, match="server 'teacher' ended with status -9, after 3 restarts"):
            wait_for(lambda: look(servers))
    assert servers.restarts == {"teacher": 3}


def test_a_stop_before_the_next_start_leaves_nothing_and_the_next_run_counts_again_from_zero(
    specs: list[ServerSpec], tmp_path: Path
) -> None:
    with running(specs, tmp_path) as (servers, events):
        everybody = [*restart(servers, events), *pids(servers["student"]).values()]
        killed = kill(servers["teacher"])  # it restarts after 2 s
        wait_for(lambda: not any(map(runs, killed)))
        begin = time.monotonic()
    assert time.monotonic() - begin < 1.5
    assert not any(map(runs, (*everybody, *killed)))
    with running(specs, tmp_path) as (servers, events):  # into the same logs
        servers.check()
        assert not servers.restarts


def test_gpus_are_given_from_the_last_one_down(specs: list[ServerSpec], tmp_path: Path) -> None:
    with running(specs, tmp_path) as (servers, _):
        expected = {"student": "1", "teacher": "0"} if torch.cuda.is_available() else {"student": "", "teacher": ""}
        assert servers.gpus == expected
        environment = Path(f"/proc/{pids(servers['teacher'])['server']}/cmdline").read_text(encoding="utf-8")
        assert ('"CUDA_VISIBLE_DEVICES": "0"' in environment) == torch.cuda.is_available()


@pytest.mark.parametrize("ends", ["in order", "after a server was killed", "after the supervisors were killed"])
def test_no_socket_is_left(specs: list[ServerSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    with tempfile.TemporaryDirectory() as short, monkeypatch.context() as patch:  # the path of a socket has 107 bytes
        patch.setattr(tempfile, "tempdir", short)
        with running(specs, tmp_path) as (servers, events):
            sockets = [path for path in Path(short).rglob("*") if path.is_socket()]
            assert len(sockets) == 2
            assert all(path.parent.stat().st_mode & 0o777 == 0o700 for path in sockets)
            if ends == "after a server was killed":
                restart(servers, events)
            if ends == "after the supervisors were killed":
                text = "".join(log.read_text(encoding="utf-8") for log in tmp_path.glob("*.log"))
                for found in re.findall(r"supervisor: (\d+)", text):
                    os.kill(int(found), signal.SIGKILL)
                with pytest.raises(UserError, match="ended with status 137"):
                    wait_for(lambda: look(servers))
        assert not list(Path(short).iterdir())


LAUNCHER = """
import sys, time
from pathlib import Path
from mmopd.config import Engine
from mmopd.runtime.processes import Children
from mmopd.serving.servers import serve
from mmopd.serving.specs import ServerSpec

model = Path(sys.argv[1])
with Children() as children, serve([ServerSpec("a", model, Engine(), updatable=False)], children, model, print):
    print("all up", flush=True)
    time.sleep(600)
"""


def test_no_socket_is_left_if_the_launcher_is_killed(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as short:
        env = {**os.environ, "TMPDIR": short, "PYTHONPATH": f"{install(tmp_path)}:{os.environ.get('PYTHONPATH', '')}"}
        command = [sys.executable, "-c", LAUNCHER, str(fake_model(tmp_path / "model"))]
        launcher = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, encoding="utf-8")
        assert launcher.stdout is not None
        assert "all up\n" in iter(launcher.stdout.readline, "")
        assert [path for path in Path(short).rglob("*") if path.is_socket()]
        launcher.kill()
        launcher.wait()
        launcher.stdout.close()
        wait_for(lambda: not list(Path(short).iterdir()))
