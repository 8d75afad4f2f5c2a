"""What a program may not do to others on the machine: hold memory beyond its limit, or reach processes of its user.

The attacks run with namespaces and, where that is possible, without them.
"""

import ctypes
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import HONEST, SQUARE, USER, answer_of, sandbox_of_a_user

from mmopd.records import Outcome
from mmopd.task import code
from mmopd.task.sandbox import Limits, Sandbox

HOSTILE = Path(__file__).parent / "hostile"
ROOT = os.getuid() == 0
LIMITS = Limits(cpu=2, wall=30.0, memory=1 << 28)


def attacks(file: str) -> dict[str, str]:
    parts = (HOSTILE / file).read_text(encoding="utf-8").split("#### ")[1:]
    return {name: body for name, _, body in (part.partition("\n") for part in parts)}


@pytest.fixture(scope="module", params=[True, False], ids=["namespaces", "none"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with Sandbox(LIMITS, namespaces=request.param) as sandbox:
        yield sandbox


@pytest.mark.parametrize("name", attacks("memory.txt"))
def test_no_memory_escapes_the_limit(name: str, sandbox: Sandbox) -> None:
    run = sandbox.run(attacks("memory.txt")[name])
    assert b"escaped" not in run.output
    assert run.failure  # it was refused, and did not just end


def test_the_same_attacks_hold_memory_where_there_is_no_sandbox() -> None:
    for name in ("memory of a shared mapping that shrinks", "memory given to pipes", "memory of rules for oneself"):
        source = attacks("memory.txt")[name].replace("1 << 26", "1 << 20")
        done = subprocess.run([sys.executable, "-I", "-c", source], capture_output=True, check=False)
        assert done.stdout == b"escaped\n", name


def state_of(process: subprocess.Popen[bytes]) -> tuple[object, ...]:
    pid = process.pid
    files = [Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8") for name in ("oom_score_adj", "limits")]
    return (
        process.poll(), os.getpriority(os.PRIO_PROCESS, pid), os.sched_getscheduler(pid), os.sched_getaffinity(pid),
        os.getpgid(pid), files,
    )  # fmt: skip


@pytest.fixture(scope="module")
def weaker() -> Iterator[Sandbox]:
    """Provide a sandbox without namespaces of an ordinary user: root's programs lack the rights of root's processes."""
    with sandbox_of_a_user(LIMITS, "limits") if ROOT else Sandbox(LIMITS, namespaces=False) as sandbox:
        yield sandbox


@pytest.mark.parametrize("name", attacks("others.txt"))
def test_no_other_process_of_the_user_is_reached(name: str, weaker: Sandbox) -> None:
    """Run without namespaces, next to a process in front of a terminal."""
    if "/proc" in attacks("others.txt")[name] and not landlock():
        pytest.skip("a file, and this kernel has no Landlock")
    ours, theirs = pty.openpty()
    user = USER if ROOT else {}
    if ROOT:
        os.fchown(theirs, 1000, 1000)
    with subprocess.Popen(["setsid", "-c", "sleep", "60"], stdin=theirs, stdout=theirs, **user) as other:
        while Path(f"/proc/{other.pid}/comm").read_text(encoding="utf-8") != "sleep\n":
            time.sleep(0.01)
        before = state_of(other)
        source = attacks("others.txt")[name].replace("@PID@", str(other.pid)).replace("@TTY@", os.ttyname(theirs))
        typing = threading.Timer(0.3, os.write, (ours, b"input\n"))
        typing.start()
        run = weaker.run(source)
        assert b"escaped" not in run.output
        assert state_of(other) == before
        typing.join()
        other.kill()
    os.close(ours)
    os.close(theirs)


def landlock() -> bool:
    return ctypes.CDLL(None).syscall(444, None, 0, 1) > 0


@pytest.mark.skipif(not landlock(), reason="this kernel has no Landlock")
def test_without_namespaces_landlock_keeps_files_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("alive", encoding="utf-8")
    with Sandbox(LIMITS, namespaces=False) as sandbox:
        for source in (
            f"open({str(tmp_path / 'file')!r})", f"open({str(tmp_path / 'new')!r}, 'w')", "open('/etc/passwd')",
            f"import os; os.unlink({str(tmp_path / 'file')!r})", f"import os; os.listdir({str(tmp_path)!r})",
            f"import os; os.truncate({str(tmp_path / 'file')!r}, 0)", "open('/dev/zero')", "open('/proc/self/maps')",
        ):  # fmt: skip
            assert "Permission denied" in sandbox.run(source).failure, source
        assert sandbox.run("import decimal, sqlite3, zoneinfo; open('x', 'w'); print(1)").output == b"1\n"
    assert (tmp_path / "file").read_text(encoding="utf-8") == "alive"


def test_without_namespaces_nothing_of_a_program_is_there_for_the_next() -> None:
    closed = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w')\nos.symlink('/', 'a/d')\n"
    closed += "os.chmod('a', 0)\nos.chmod('.', 0)"
    before = {path.name for path in Path("/tmp").iterdir()}
    with Sandbox(LIMITS, namespaces=False) as sandbox:
        sandbox.run(closed)
        assert sandbox.run("import os; open('y', 'w'); print(os.listdir())").output == b"['y']\n"
    assert not {path.name for path in Path("/tmp").iterdir() if path.name.startswith("mmopd-room")} - before


MANY = """
import os, resource, sys
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
most = 5000 if hard == resource.RLIM_INFINITY else min(hard, 5000)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
files = [os.open("/dev/null", os.O_RDONLY) for _ in range(most - 100)]
from mmopd.task.sandbox import Limits, Sandbox
from mmopd.task.verifier_pool import VerifierPool
with VerifierPool(None, workers=1, timeout=300.0) as pool:
    print(pool.submit("text_code", sys.argv[1], sys.argv[2]).result())
shown = "import os\\nfor n in range(10000):\\n    try: os.fstat(n); print(n)\\n    except OSError: pass"
for namespaces in (True, False):
    with Sandbox(Limits(wall=60.0), namespaces=namespaces) as sandbox:
        print(sandbox.run(shown).output.split())
"""


def test_a_launcher_with_many_open_files_can_judge_and_gives_none_of_them_away() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MANY, answer_of(HONEST["input"]), SQUARE],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1], encoding="utf-8",
    )  # fmt: skip
    own = str([b"0", b"1", b"2", b"3", b"4"])  # input, output, errors, result, /dev/null
    assert done.stdout.splitlines() == [str(Outcome(1.0)), own, own], done.stderr[-2000:]


def test_the_weaker_mode_judges_the_same() -> None:
    verify = code.verifier(Limits(wall=60.0), namespaces=False)
    for name in ("main", "fast output", "asyncio", "devices", "files", "deep", "library", "mapped input", "no errors"):
        assert verify(answer_of(HONEST[name]), SQUARE) == Outcome(1.0), name
