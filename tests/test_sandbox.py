"""Model-written programs: honest ones are right, 150 hostile ones reach nothing, and a machine that cannot isolate them
is refused.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from mmopd.errors import UserError
from mmopd.records import Outcome
from mmopd.task import code, jail
from mmopd.task.sandbox import Limits, Sandbox
from mmopd.task.verifier_pool import VerifierPool

HOSTILE = Path(__file__).parent / "hostile"
QUICK = Limits(cpu=1, wall=1.5)
SQUARE = json.dumps({"inputs": ["3\n", "12"], "outputs": ["9\n", "144"]})
PRIMES = {"inputs": ["1000\n", "10000\n", "10001\n"], "outputs": ["7919\n", "104729\n", "104743\n"]}


def answer_of(program: str) -> str:
    return f"So:\n```python\n{program}\n```\n"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(QUICK) as sandbox:
        yield sandbox


def processes() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


HONEST = {
    "input": "print(int(input()) ** 2)",
    "main": "def main():\n    print(int(input()) ** 2)\n\nif __name__ == '__main__':\n    main()",
    "stdin": "import sys\nn = int(sys.stdin.readline())\nsys.stdout.write(f'{n * n}\\n')",
    "bytes": "import os\nn = int(open(0, 'rb').read())\nos.write(1, str(n * n).encode())",
    "own stdout": "import sys, io\nn = int(sys.stdin.buffer.read())\n"
    "sys.stdout = io.TextIOWrapper(open(1, 'wb', closefd=False))\nprint(n * n)",
    "left open": "out = open(1, 'w')\nn = int(input())\nout.write(str(n * n))",
    "exit": "n = int(input())\nprint(n * n)\nexit()",
    "at exit": "import atexit\nn = int(input())\natexit.register(print, n * n)",
    "deep": "import sys, threading\nsys.setrecursionlimit(1 << 20)\nthreading.stack_size(1 << 27)\n"
    "def f(n, k):\n    return n * n if k == 0 else f(n, k - 1)\n"
    "def main():\n    print(f(int(input()), 100000))\n"
    "thread = threading.Thread(target=main)\nthread.start()\nthread.join()",
    "thread at the end": "import threading, time\n"
    "def main():\n    n = int(input())\n    time.sleep(0.1)\n    print(n * n)\n"
    "threading.Thread(target=main).start()",
    "files": "n = int(input())\nopen('x', 'w').write(str(n))\nprint(int(open('x').read()) ** 2)",
    "library": "import asyncio.locks, bisect, collections, ctypes, dataclasses, decimal, fractions, hashlib\n"
    "import heapq, json, re\nimport sqlite3, typing, zoneinfo, unittest, concurrent.futures\nprint(int(input()) ** 2)",
    "data class": "from dataclasses import dataclass\n@dataclass\nclass N:\n    n: int\n"
    "n = N(int(input()))\nprint(n.n ** 2)",
}


@pytest.mark.parametrize("name", HONEST)
def test_a_program_that_solves_the_problem_is_right(name: str) -> None:
    assert code.verifier(QUICK)(answer_of(HONEST[name]), SQUARE) == Outcome(1.0)


@dataclass(frozen=True)
class Outside:
    """The files and sockets that attacks try to reach."""

    key: Path
    folder: Path
    canary: Path
    unix: Path
    port: int

    def aim(self, program: str) -> str:
        names = {
            "KEY": self.key,
            "DIR": self.folder,
            "CANARY": self.canary,
            "PID": os.getpid(),
            "PORT": self.port,
            "UNIX": self.unix,
        }
        for name, value in names.items():
            program = program.replace(f"@{name}@", str(value))
        return program


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[tuple[Outside, list[socket.socket]]]:
    """Provide files that everybody may read and write, and sockets that listen."""
    folder = tmp_path / "outside"
    folder.mkdir()
    opened = {
        path: path.stat().st_mode
        for path in (folder, *folder.parents)
        if path.stat().st_uid == os.getuid() and not path.is_mount()
    }
    for path, mode in opened.items():  # so that the programs of `nobody` could get here
        path.chmod(mode | 0o777 if path == folder else mode | 0o055)
    files = Outside(folder / "key.json", folder, folder / "canary", folder / "socket", 0)
    files.key.write_text(json.dumps(PRIMES))
    files.canary.write_text("alive")
    files.canary.chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(files.unix))
        unix.listen()
        files.unix.chmod(0o777)
        for server in (tcp, unix):
            server.setblocking(False)
        yield Outside(files.key, folder, files.canary, files.unix, tcp.getsockname()[1]), [tcp, unix]
    for path, mode in opened.items():
        path.chmod(mode)


def attacks() -> dict[str, str]:
    parts = [part for file in sorted(HOSTILE.glob("*.txt")) for part in file.read_text().split("#### ")[1:]]
    return {name: body for name, _, body in (part.partition("\n") for part in parts)}


def touched(files: Outside, servers: list[socket.socket]) -> list[str]:
    """Return what an attack has reached."""
    found = [
        f"made {path.name}" for path in files.folder.iterdir() if path.name not in ("key.json", "canary", "socket")
    ]
    found += ["the canary"] if not files.canary.exists() or files.canary.read_text() != "alive" else []
    for server in servers:
        try:
            server.accept()[0].close()
            found.append(f"connected to {server.getsockname()}")
        except BlockingIOError:
            pass
    return found


def test_no_hostile_program_escapes_or_is_right(outside: tuple[Outside, list[socket.socket]]) -> None:
    files, servers = outside
    programs = attacks()
    assert len(programs) >= 150
    verify = code.verifier(QUICK)
    assert verify(answer_of(HONEST["input"]), SQUARE) == Outcome(1.0)
    before, listed = processes(), set(Path("/tmp").iterdir())
    keys = {
        True: json.dumps({"fn_name": "secret", "inputs": [[1000], [10000]], "outputs": [7919, 104729]}),
        False: json.dumps(PRIMES),
    }
    begin, found = time.monotonic(), {}
    for name, program in programs.items():
        outcome = verify(answer_of(files.aim(program)), keys["(function)" in name])
        reached = touched(files, servers)
        if outcome.value != 0 or reached or processes() != before:
            found[name] = (outcome, reached, processes() - before)
    assert found == {}
    assert time.monotonic() - begin < 90
    assert verify(answer_of(HONEST["files"]), SQUARE) == Outcome(1.0)  # the sandbox still works
    assert {path for path in Path("/tmp").iterdir() if "room" in path.name} <= listed


@pytest.mark.parametrize(
    "name",
    [
        "read the answers",
        "write outside",
        "overwrite a file outside",
        "tcp to this machine",
        "socket in the file system",
    ],
)
def test_the_same_attacks_reach_their_aim_where_there_is_no_sandbox(
    name: str, outside: tuple[Outside, list[socket.socket]]
) -> None:
    files, servers = outside
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", files.aim(attacks()[name]).replace("recv(1000)", "fileno()")],
        input="1000\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert touched(files, servers) or done.stdout.strip() == "7919"


def test_a_program_sees_nothing_but_itself(sandbox: Sandbox) -> None:
    shown = sandbox.run(
        "import os\nprint(os.getcwd(), os.listdir('.'), *(os.path.exists(path) for path in ('/proc', '/home', '/dev')))"
    )
    assert shown.output == b"/room [] False False False\n"
    shown = sandbox.run("import os\nprint(sorted(os.environ), os.getppid(), os.getuid(), os.geteuid())")
    assert shown.output.decode().split() == [
        "['LC_CTYPE',",
        "'PYTHONDONTWRITEBYTECODE',",
        "'PYTHONHASHSEED',",
        "'PYTHONUTF8']",
        "1",
        "65534",
        "65534",
    ]
    secret = os.urandom(8).hex()
    os.environ["MMOPD_TEST_SECRET"] = secret
    assert (
        secret.encode()
        not in sandbox.run("import os, gc\nprint(os.environ, [str(x)[:1000] for x in gc.get_objects()])").output
    )


def test_nothing_of_a_program_is_there_for_the_next(sandbox: Sandbox) -> None:
    sandbox.run(
        "import os, sys\nopen('x', 'w').write('mark-' + 'of-one')\nos.mkdir('d')\n"
        "sys.modules['json'] = None\nos.chmod('.', 0)"
    )
    # `chr` keeps the mark out of this program's own constants.
    seen = "any(chr(109) + 'ark-of-one' in str(x) for x in gc.get_objects())"
    run = sandbox.run(f"import os, json, gc\nopen('y', 'w').write('2')\nprint(os.listdir('.'), {seen})")
    assert run.output == b"['y'] False\n"


def test_limits_are_kept_and_named() -> None:
    with Sandbox(Limits(cpu=1, wall=1.5, memory=1 << 28, disk=1 << 20, output=1 << 16)) as sandbox:
        assert sandbox.run("while True: pass").failure == "out of time"
        assert sandbox.run("import time; time.sleep(60)").failure == "out of time"
        assert "MemoryError" in sandbox.run("bytearray(1 << 28)").failure
        assert "No space left" in sandbox.run("for i in range(100): open(str(i), 'wb').write(bytes(1 << 15))").failure
        run = sandbox.run("print('x' * (1 << 20))")
        assert run.failure
        assert len(run.output) <= 1 << 16
        assert sandbox.run(
            "import threading, time\n"
            "for _ in range(200): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
        ).failure
        assert sandbox.run("raise SystemExit(3)").failure == "status 3"
        assert sandbox.run("1 / 0").failure == "status 1: ZeroDivisionError: division by zero"


def test_threads_share_a_sandbox(sandbox: Sandbox) -> None:
    with ThreadPoolExecutor(4) as threads:
        assert [run.output for run in threads.map(lambda i: sandbox.run("print(input())", f"{i}\n"), range(20))] == [
            b"%d\n" % i for i in range(20)
        ]


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
        pids = (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []
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
    )  # fmt: skip
    assert (
        "UserError: No sandbox: unshare: No space left on device. Model-written programs run in Linux namespaces"
        in done.stderr
    )
    assert "namespaces=False" in done.stderr


def test_without_namespaces_only_if_asked_there_are_the_limits_and_the_filter(
    outside: tuple[Outside, list[socket.socket]],
) -> None:
    files, servers = outside
    before = processes()
    with Sandbox(QUICK, namespaces=False) as sandbox:
        assert sandbox.run("print(int(input()) ** 2)", "3").output == b"9\n"
        assert sandbox.run(HONEST["thread at the end"], "3").output == b"9\n"
        for name in ("fork bomb", "kill everyone", "tcp to this machine", "socket in the file system", "os.system"):
            assert sandbox.run(files.aim(attacks()[name]), "3").output not in {b"9", b"9\n"}
            assert touched(files, servers) == []
        assert sandbox.run("import os; os.kill(os.getppid(), 9)").status == 1
        assert sandbox.run("import os; open('x', 'w'); print(os.listdir('.'))").output == b"['x']\n"
        assert sandbox.run("import os; print(os.listdir('.'))").output == b"[]\n"
        assert sandbox.run("while True: pass").failure == "out of time"
    assert processes() == before


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
    (tmp_path / "modalities/slow.py").write_text(text)
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
    """Run as another user where root may drop its rights, with another interpreter, since this one may lie where only
    root can go.
    """
    python = "/usr/bin/python3"
    version = subprocess.run(
        [python, "-c", "import sys; print(sys.version_info >= (3, 11))"], capture_output=True, text=True, check=False
    )
    if version.stdout != "True\n":
        pytest.skip(f"{python} is older than 3.11")
    script = Path(tempfile.mkdtemp()) / "jail.py"
    script.parent.chmod(0o755)
    script.write_text(Path(jail.__file__).read_text())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [python, "-P", "-s", "-S", str(script), str(theirs.fileno()), "apart"]
    process = subprocess.Popen(
        command, pass_fds=[theirs.fileno()], user=1000, group=1000, extra_groups=[], env={}, cwd="/"
    )
    theirs.close()
    assert ours.recv(1 << 16) == b"{}"
    sandbox = Sandbox(QUICK)
    sandbox._channel, sandbox._jail = ours, process
    with sandbox:
        run = sandbox.run(
            "import os, threading\n"
            "threading.Thread(target=print, args=(os.getuid(), os.listdir())).start()\nopen('x', 'w')"
        )
        assert (run.failure, run.output) == ("", b"65534 []\n")
        assert "Operation not permitted" in sandbox.run("import os\nos.fork()").failure
        assert "No such file" in sandbox.run("open('/etc/passwd')").failure
        assert "Read-only" in sandbox.run("open('/usr/lib/x', 'w')").failure
    shutil.rmtree(script.parent)


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
    )  # fmt: skip
    assert "output=b'65534 []\\n'" in done.stdout, done.stderr
    assert "Operation not permitted" in done.stdout


def test_another_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: "5.4.0-26-generic")
    with pytest.raises(UserError, match=r"Linux 5\.14 or newer"), Sandbox() as sandbox:
        sandbox.run("")
