"""The process that imports vLLM, or what launchers and ranks need, once for a whole run of pytest, and forks.

`python forking.py KIND NAME PYTEST` listens on the abstract socket NAME, and ends with the process PYTEST. Each
connection asks for one process by a JSON object, with its standard streams as file descriptors. The answers are the
process id and later the exit status. A fork has the arguments, the environment and the folder of the request, and
shows them in /proc, as a process that was started would.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

KINDS = ("servers", "ranks")
LONGEST = 1 << 17  # bytes of a request
ROOM = 1 << 13  # bytes for the arguments, and for the variables, that a fork shows
PADDING = "MMOPD_TEST_PADDING"
# Variables that are read during an import, by the beginning of their names, and those of them that are read later.
READ_EARLY = ("VLLM_", "OMP_", "MKL_", "LD_PRELOAD", "PYTHON", "TORCHDYNAMO_", "LC_", "LANG", "MALLOC")
READ_LATE = {"VLLM_API_KEY", "VLLM_RPC_BASE_PATH", "VLLM_SERVER_DEV_MODE"}


def early(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a fork cannot have otherwise than its parent had them."""
    return {name: value for name, value in env.items() if name.startswith(READ_EARLY) and name not in READ_LATE}


def preload(kind: str) -> None:
    """Import what processes of a kind import."""
    if kind == "servers":
        from vllm.model_executor.models import qwen2_5_vl, qwen2_vl, qwen3_vl  # noqa: F401

        from mmopd.serving import guarded_http, supervisor  # noqa: F401

        supervisor.preload(set())
    else:
        for name in ("train_worker", "student_worker", "deepspeed", "mmopd.cli", "mmopd.commands.train", "mmopd.train"):
            importlib.import_module(name)
        from mmopd.commands import export  # noqa: F401
        from mmopd.train import export_rank, rank  # noqa: F401


def run(arguments: list[str]) -> None:
    """Do what `python -m ARGUMENTS` does, or call the `main` of a worker of the tests."""
    name, *rest = arguments
    sys.argv = [name, *rest]
    module = importlib.import_module("mmopd.cli" if name == "mmopd" else name)
    if name == "mmopd.serving.supervisor":
        sys.exit(module.main(rest))
    sys.exit(module.main(*rest) if name.endswith("_worker") else module.main())


def finish(work: Callable[[], None]) -> None:
    """Work, and end this process as the interpreter would."""
    status = 0
    try:
        work()
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def show(arguments: list[str], env: dict[str, str]) -> None:
    """Write arguments and variables where /proc/PID/cmdline and environ read them, as far as there is room."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    for begin, end, lines in (
        (*fields[45:47], arguments),
        (*fields[47:49], [f"{name}={value}" for name, value in sorted(env.items(), key=lambda pair: len(pair[1]))]),
    ):
        size = int(end) - int(begin)
        text = b"".join(os.fsencode(line) + b"\0" for line in lines)[: size - 1]
        ctypes.memmove(int(begin), text.ljust(size, b"\0"), size)


def become(request: dict[str, Any], streams: list[int]) -> None:
    """Be the process that a request describes, in a fork; does not return."""
    from mmopd.runtime import processes, python

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    command = python.command("-m", *request["arguments"])

    def start() -> None:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        show(command, request["env"])
        finish(lambda: run(request["arguments"]))

    if (parent := request["guarded_by"]) is None:
        start()
    os.setsid()
    show([sys.executable, "-I", "-S", processes.__file__, str(parent), *command], request["env"])
    try:
        watched = os.pidfd_open(parent)
    except ProcessLookupError:
        os._exit(128 + signal.SIGTERM)
    os._exit(processes.guard_twice(watched, start))


class Forking:
    """Forks for each request, and reports each end.

    Args:
        early: a request for a guarded process that has other variables of this kind is refused by the number 0.
    """

    def __init__(self, listening: socket.socket, watched: int, early: dict[str, str]) -> None:
        self._early = early
        self._listening = listening
        self._watched = watched
        self._running: dict[int, socket.socket] = {}

    def serve(self) -> None:
        """Answer requests until the watched process ends."""
        wake, notify = os.pipe()
        os.set_blocking(notify, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(notify, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            ready, _, _ = select.select([self._listening, wake, self._watched], [], [])
            if wake in ready:
                os.read(wake, 4096)
                self._report()
            if self._listening in ready:
                self._fork((wake, notify))
            if self._watched in ready:
                break
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)  # not reaped, so the number is still its own

    def _fork(self, pipe: tuple[int, int]) -> None:
        asked, _ = self._listening.accept()
        message, streams, _, _ = socket.recv_fds(asked, LONGEST, 3)
        request = json.loads(message)
        if request["guarded_by"] and early(request["env"]) != self._early:
            self._say(asked, 0)
            pid = None
        else:
            pid = os.fork()
        if pid == 0:
            try:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for number in (*pipe, self._watched):
                    os.close(number)
                for one in (self._listening, asked, *self._running.values()):
                    one.close()
                become(request, streams)
            except BaseException:
                traceback.print_exc()
            os._exit(127)
        for stream in streams:
            os.close(stream)
        if pid:
            self._running[pid] = asked
            self._say(asked, pid)

    def _report(self) -> None:
        """Tell the status of all that have ended."""
        for pid in list(self._running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with self._running.pop(pid) as asked:
                    self._say(asked, os.waitstatus_to_exitcode(status))

    @staticmethod
    def _say(asked: socket.socket, number: int) -> None:
        with suppress(OSError):  # it has ended, too
            asked.send(b"%d" % number)


def main(kind: str, name: str, pytest: str) -> None:
    """Serve requests; end at once if another process does."""
    os.environ.pop(PADDING)
    own = early(os.environ)
    for variable, value in list(os.environ.items()):
        os.environ[variable] = value  # a copy elsewhere, since forks write over the memory that they were read from
    try:
        watched = os.pidfd_open(int(pytest))
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listening.bind(f"\0{name}")
    except OSError:
        return
    listening.listen(64)
    preload(kind)
    import forks

    forks.session = int(pytest)
    forks.install()
    gc.collect()
    gc.freeze()
    Forking(listening, watched, own).serve()


if __name__ == "__main__":
    tests = Path(__file__).parent
    sys.path[:0] = [str(tests), str(tests.parent)]
    main(*sys.argv[1:4])
