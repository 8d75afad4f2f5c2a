"""Model-written programs: 190 hostile ones reach nothing, and a machine that cannot isolate them
is refused.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from programs import HONEST, QUICK, SQUARE, answer_of, processes

from mmopd.records import Outcome
from mmopd.task import code
from mmopd.task.sandbox import Limits, Sandbox

HOSTILE = Path(__file__).parent / "hostile"
PRIMES = {"inputs": ["1000\n", "10000\n", "10001\n"], "outputs": ["7919\n", "104729\n", "104743\n"]}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(QUICK) as sandbox:
        yield sandbox


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
    files.key.write_text(json.dumps(PRIMES), encoding="utf-8")
    files.canary.write_text("alive", encoding="utf-8")
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
    parts = [
        part for file in sorted(HOSTILE.glob("*.txt")) for part in file.read_text(encoding="utf-8").split("#### ")[1:]
    ]
    return {name: body for name, _, body in (part.partition("\n") for part in parts)}


def touched(files: Outside, servers: list[socket.socket]) -> list[str]:
    """Return what an attack has reached."""
    found = [
        f"made {path.name}" for path in files.folder.iterdir() if path.name not in ("key.json", "canary", "socket")
    ]
    found += ["the canary"] if not files.canary.exists() or files.canary.read_text(encoding="utf-8") != "alive" else []
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
    assert len(programs) >= 190
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
    assert time.monotonic() - begin < 150
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
    encoding="utf-8")  # fmt: skip
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
