"""Training ranks for tests, forked from one process that has imported torch, DeepSpeed and mmopd.

The imports take most of the CPU time of a rank whose model is tiny. Each pytest process has one such process, started
with its first rank: `python forks.py`. It reads a JSON line for each call, and answers with a line.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from mmopd.runtime.network import free_port

WORKERS = ("deepspeed", "train_worker", "student_worker")
ENV = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


class Rank:
    """A rank that was forked; `poll`, `kill` and `returncode` are those of `subprocess.Popen`."""

    def __init__(self, worker: str, arguments: Sequence[str], env: dict[str, str], log: Path) -> None:
        self.returncode: int | None = None
        self._pid = ask("fork", worker, list(arguments), env, str(log))

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = ask("wait", self._pid)
        return self.returncode

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            os.kill(self._pid, signal.SIGKILL)


def start_ranks(worker: str, arguments: Sequence[str], size: int, log: str, **env: str) -> list[Rank]:
    """Start `size` ranks that call the `main` of a worker; {rank} in `log` becomes the number of the rank."""
    env |= {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Rank(worker, arguments, {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}, Path(log.format(rank=rank)))
        for rank in range(size)
    ]


def ask(*call: Any) -> Any:
    """Return what the forking process answers to a call."""
    process = forking_process()
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(call), file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


@cache
def forking_process() -> "subprocess.Popen[str]":
    """Start the process that forks; it ends with this one, when its standard input is closed."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | ENV | {"PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
    )


def main() -> None:
    """Import what the ranks import, then answer calls until standard input is closed; end what still runs."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print while they are imported
    for worker in WORKERS:
        importlib.import_module(worker)
    running = set[int]()
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        if name == "fork":
            answer: int | None = fork(*arguments)
            running.add(answer)
        else:
            pid, status = os.waitpid(arguments[0], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        print(json.dumps(answer), file=answers, flush=True)
    for pid in running:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def fork(worker: str, arguments: list[str], env: dict[str, str], log: str) -> int:
    """Call the `main` of a worker in a new process; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(env)
        sys.modules[worker].main(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
