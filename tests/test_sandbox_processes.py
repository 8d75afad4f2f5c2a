"""The processes of a sandbox: none is left, other users and machines have the same, or are refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from programs import HONEST, QUICK, SQUARE, answer_of, processes, sandbox_of_a_user

from mmopd.errors import UserError
from mmopd.records import Outcome
from mmopd.task.sandbox import Sandbox
from mmopd.task.verifier_pool import VerifierPool


def test_a_sandbox_that_is_killed_is_an_error_and_the_next_call_has_a_new_one() -> None:
    before = processes()
    with Sandbox(QUICK) as sandbox:
        sandbox.run("")
        for process in processes() - before:
            process.kill()
        with pytest.raises(RuntimeError, match="the sandbox"):
            sandbox.run("print(1)")
        assert sandbox.run("print(1)").output == b"1\n"
    assert processes() == before


def test_a_sandbox_ends_with_the_process_that_has_it(tmp_path: Path) -> None:
    """Kill the process in the middle of a program."""
    source = (
        "from mmopd.task.sandbox import *; import psutil, sys, threading, time\n"
        "sandbox = Sandbox(Limits(cpu=60, wall=60)); sandbox.run('')\n"
        "threading.Thread(target=sandbox.run, args=('while True: pass',)).start(); time.sleep(0.5)\n"
        "pids = ' '.join(str(p.pid) for p in psutil.Process().children(recursive=True))\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(pids + ' end')\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", source], cwd=Path(__file__).parents[1])
    pids: list[str] = []
    while pids[-1:] != ["end"]:
        time.sleep(0.1)
        pids = (tmp_path / "pids").read_text(encoding="utf-8").split() if (tmp_path / "pids").exists() else []
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert len(pids) == 4  # the two of the sandbox, and the program
    for _ in range(50):
        if not any(psutil.pid_exists(int(pid)) for pid in pids[:-1]):
            return
        time.sleep(0.1)
    pytest.fail(f"of {pids} some live on")


def test_a_machine_without_namespaces_is_refused_with_the_way_out() -> None:
    """Let the kernel refuse: in a user namespace that may contain no other."""
    source = "from mmopd.task import code; print(code.verifier()('```python\\nprint(9)\\n```', sys.argv[1]))"
    inside = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$0" -c "import sys; $1" "$2"'
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", inside, sys.executable, source, SQUARE],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    encoding="utf-8")  # fmt: skip
    assert (
        "UserError: No sandbox: unshare: No space left on device. Model-written programs run in Linux namespaces"
        in done.stderr
    )
    assert "namespaces=False" in done.stderr


def test_the_pool_judges_programs_and_leaves_nothing(tmp_path: Path) -> None:
    before = processes()
    with VerifierPool(tmp_path, workers=2, timeout=30.0) as pool:
        asked = [
            pool.submit("text_code", answer_of(program), SQUARE)
            for program in (HONEST["input"], "print(9)", "while True: pass", "import os; os.abort()")
        ]
        outcomes = [future.result() for future in asked]
        assert [outcome.value for outcome in outcomes] == [1.0, 0.0, 0.0, 0.0]
        assert [outcome.reason for outcome in outcomes[1:]] == [
            "test 2 of 2: another output",
            "test 1 of 2: out of time",
            "test 1 of 2: status -6",
        ]
    assert processes() == before


def test_a_program_that_outlasts_the_pools_patience_is_unknown_and_gone(tmp_path: Path) -> None:
    (tmp_path / "modalities").mkdir()
    text = "from mmopd.task import Task, code\nfrom mmopd.task.sandbox import Limits\n"
    text += "task = Task(name='slow', modality='text', verify=code.verifier(Limits(cpu=60, wall=60)), timeout=2.0)\n"
    (tmp_path / "modalities/slow.py").write_text(text, encoding="utf-8")
    before = processes()
    with VerifierPool(tmp_path, workers=1, timeout=60.0) as pool:
        assert pool.submit("slow", answer_of(HONEST["input"]), SQUARE).result() == Outcome(1.0)
        outcome = pool.submit("slow", answer_of("while True: pass"), SQUARE).result()
        assert not outcome.known
        assert outcome.reason == "timeout"
        for _ in range(50):
            if len(processes() - before) == 0:
                break
            time.sleep(0.1)
        assert processes() == before
        assert pool.submit("slow", answer_of(HONEST["input"]), SQUARE).result() == Outcome(1.0)


@pytest.mark.skipif(os.getuid() != 0, reason="an ordinary user runs these tests already")
def test_an_ordinary_user_has_the_same() -> None:
    with sandbox_of_a_user(QUICK, "apart") as sandbox:
        run = sandbox.run(
            "import os, threading\n"
            "threading.Thread(target=print, args=(os.getuid(), os.listdir())).start()\nopen('x', 'w')"
        )
        assert (run.failure, run.output) == ("", b"65534 []\n")
        assert "Operation not permitted" in sandbox.run("import os\nos.fork()").failure
        assert "No such file" in sandbox.run("open('/etc/passwd')").failure
        assert "Read-only" in sandbox.run("open('/usr/lib/x', 'w')").failure


@pytest.mark.skipif(os.getuid() != 0, reason="root's case")
def test_root_without_rights_has_the_same() -> None:
    """Run as in a container: no CAP_SYS_ADMIN, but user namespaces."""
    source = (
        "from mmopd.task.sandbox import Sandbox; "
        "print(Sandbox().run('import os; print(os.getuid(), os.listdir()); os.fork()'))"
    )
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c", source],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    encoding="utf-8")  # fmt: skip
    assert "output=b'65534 []\\n'" in done.stdout, done.stderr
    assert "Operation not permitted" in done.stdout


def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: "5.4.0-26-generic")
    with pytest.raises(UserError, match=r"Linux 5\.14 or newer"), Sandbox() as sandbox:
        sandbox.run("")
