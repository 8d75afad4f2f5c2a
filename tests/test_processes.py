import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmopd.runtime.processes import Child, Children, stop

# A command with a grandchild that tries to survive: it ignores SIGTERM and has its own session.
STUBBORN = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(sys.argv[1], "w").write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
time.sleep(600)
"""
PARENT = """
import sys, time
from pathlib import Path
from mmopd.runtime.processes import Children
with Children() as children:
    children.start("stubborn", [sys.executable, "-c", sys.argv[2], sys.argv[1] + "/pid"], Path(sys.argv[1], "log"))
    print("started", flush=True)
    time.sleep(600)
"""


def await_file(path: Path) -> int:
    for _ in range(300):
        if path.is_file() and path.read_text(encoding="utf-8"):
            return int(path.read_text(encoding="utf-8"))
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")


def gone(pid: int, seconds: float = 15.0) -> bool:
    """Return whether a process ends in time; a zombie has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


def start_parent(folder: Path) -> tuple["subprocess.Popen[str]", int]:
    command = [sys.executable, "-c", PARENT, str(folder), STUBBORN]
    parent = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[1],
        encoding="utf-8",
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    return parent, await_file(folder / "pid")


def test_the_exit_status_and_the_output_of_a_command_come_back(tmp_path: Path) -> None:
    with Children() as children:
        child = children.start("x", ["sh", "-c", "echo $GREETING; exit 7"], tmp_path / "log", {"GREETING": "hello"})
        assert child.wait(30) == 7
    assert child.log.read_text(encoding="utf-8") == "hello\n"


def test_a_signal_and_a_missing_command_have_the_status_of_a_shell(tmp_path: Path) -> None:
    with Children() as children:
        killed = children.start("x", ["sh", "-c", "kill -9 $$"], tmp_path / "killed")
        missing = children.start("y", ["/nonexistent/command"], tmp_path / "missing")
        assert killed.wait(30) == 128 + signal.SIGKILL
        assert missing.wait(30) == 127
    assert "No such file or directory" in missing.log.read_text(encoding="utf-8")


def test_processes_that_a_command_leaves_end_with_it(tmp_path: Path) -> None:
    with Children() as children:
        child = children.start(
            "x", [sys.executable, "-c", STUBBORN.rpartition("time")[0], str(tmp_path / "pid")], tmp_path / "log"
        )
        assert child.wait(60) == 0
    assert not (tmp_path / "pid").exists() or gone(int((tmp_path / "pid").read_text(encoding="utf-8")), 0.5)


def test_stop_ends_a_tree_that_ignores_the_signal(tmp_path: Path) -> None:
    ignores = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + STUBBORN
    child = Child("x", [sys.executable, "-c", ignores, str(tmp_path / "pid")], {}, tmp_path / "log")
    pid = await_file(tmp_path / "pid")
    stop([child], grace=0.5)
    assert not child.alive
    assert child.returncode == 128 + signal.SIGKILL
    assert gone(pid, 0.5)


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    pids = []

    def fail() -> None:
        with Children() as children:
            children.start("x", [sys.executable, "-c", STUBBORN, str(tmp_path / "pid")], tmp_path / "log")
            pids.append(await_file(tmp_path / "pid"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert gone(pids[0], 0.5)


def test_nothing_is_started_after_the_stop(tmp_path: Path) -> None:
    with Children() as children:
        pass
    with pytest.raises(RuntimeError, match="late: not started"):
        children.start("late", ["true"], tmp_path / "log")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_nothing_survives_a_parent_that_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    parent, pid = start_parent(tmp_path)
    guards = children_of(parent.pid)
    parent.send_signal(number)
    parent.communicate()
    assert gone(pid)
    assert all(gone(guard) for guard in guards)


@pytest.mark.parametrize("depth", [1, 2], ids=["outer", "inner"])
def test_nothing_survives_a_guard_that_is_killed(tmp_path: Path, depth: int) -> None:
    child = Child("x", [sys.executable, "-c", STUBBORN, str(tmp_path / "pid")], {}, tmp_path / "log")
    pid = await_file(tmp_path / "pid")
    (inner,) = children_of(child.pid)
    os.kill({1: child.pid, 2: inner}[depth], signal.SIGKILL)
    assert child.wait(30) is not None
    assert gone(pid)
    assert gone(inner)


def test_ctrl_c_reaches_the_parent_alone_and_leaves_nothing(tmp_path: Path) -> None:
    parent, pid = start_parent(tmp_path)
    os.killpg(parent.pid, signal.SIGINT)
    parent.communicate()
    assert parent.returncode == -signal.SIGINT  # Python ends so by KeyboardInterrupt
    assert gone(pid, 0.5)
    assert "KeyboardInterrupt" not in (tmp_path / "log").read_text(encoding="utf-8")
