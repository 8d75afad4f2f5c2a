"""Runs programs that nobody has read, isolated from everything else: `Sandbox.run`.

Programs run in a process of `mmopd.task.jail`, one for each sandbox, which is started when it is first needed and kept.
Inputs and outputs of a program are files in memory, of bounded size. Linux only, 5.14 or newer.
"""

import contextlib
import fcntl
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mmopd.errors import UserError
from mmopd.task import jail
from mmopd.task.jail.filter import ARCHITECTURES

KERNEL = (5, 14)  # the first that counts processes separately in each user namespace
START = 600.0  # seconds for the process to confine itself; one that ends is noticed at once
GRACE = 10.0  # seconds for its answer, beyond the program's time
WAY_OUT = (
    "Model-written programs run in Linux namespaces, and this machine does not allow them. Allow user namespaces "
    "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0); or start the container with "
    "--cap-add SYS_ADMIN, or with --security-opt seccomp=unconfined --security-opt apparmor=unconfined; or give the "
    "task a verifier that works without namespaces, `code.verifier(namespaces=False)`: where the kernel lacks "
    "Landlock, a program can then read and write every file that you can."
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one run of a program."""

    cpu: int = 4  # seconds, of all its threads together
    wall: float = 10.0  # seconds of wall-clock time
    memory: int = 1 << 29  # bytes of address space
    disk: int = 1 << 24  # bytes of its directory, which is in memory
    output: int = 1 << 22  # bytes of a file, standard output included
    threads: int = 64


@dataclass(frozen=True, slots=True)
class Run:
    """Result of a run of a program."""

    output: bytes  # standard output, cut at the limit
    errors: str  # the end of standard error
    result: bytes  # JSON of the function's result; empty if no function was called, or it did not return
    status: int  # exit status; -n if signal n ended the program
    late: bool  # killed because its time was up
    cpu: float  # seconds
    wall: float  # seconds

    @property
    def failure(self) -> str:
        """Reason why the program did not end by itself with status 0; empty if it did."""
        if self.late or self.status == -signal.SIGXCPU:
            return "out of time"
        if self.status == 0:
            return ""
        last = self.errors.strip().rpartition("\n")[2]
        return f"status {self.status}: {last}" if last else f"status {self.status}"


class Sandbox:
    """Runs programs one after the other; threads may share it.

    Args:
        limits: limits of each run.
        namespaces: False works on a machine without namespaces. Limits, no network, and no system call that reaches
            another process still hold. A program reads and writes what the user can, unless the kernel has Landlock.
    """

    def __init__(self, limits: Limits = Limits(), *, namespaces: bool = True) -> None:
        self.limits = limits
        self._namespaces = namespaces
        self._lock = threading.Lock()
        self._jail: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def run(self, program: str, stdin: str = "", *, function: str | None = None, arguments: Sequence[Any] = ()) -> Run:
        """Run a Python program as a script; then call a function of it (or of its class `Solution`), if one is named.

        Raises:
            UserError: the machine does not allow what is needed to isolate programs.
            RuntimeError: the process that runs programs has died or hangs; the next call starts another one.
        """
        job = json.dumps({"program": program, "function": function, "arguments": list(arguments)})
        with self._lock, contextlib.ExitStack() as files:
            given = [_memory(files, text.encode(errors="replace")) for text in (job, stdin)]
            taken = [_memory(files) for _ in ("output", "errors", "result")]
            reply = self._ask([*given, *taken])
            output, errors, result = (_contents(file, self.limits.output) for file in taken)
        return Run(output, errors[-4096:].decode(errors="replace"), result, **reply)

    def close(self) -> None:
        """End the process; nothing of any program remains."""
        with self._lock:
            self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, files: list[int]) -> dict[str, Any]:
        if self._channel is None:
            self._channel = self._start()
        limits = {name: getattr(self.limits, name) for name in Limits.__slots__}
        try:
            socket.send_fds(self._channel, [json.dumps(limits).encode()], files)
            self._channel.settimeout(self.limits.wall + GRACE)
            message = self._channel.recv(1 << 16)
        except OSError as error:
            self._close()
            raise RuntimeError(f"the sandbox gave no answer: {error}") from None
        if not message:
            self._close()
            raise RuntimeError("the sandbox has died")
        reply: dict[str, Any] = json.loads(message)
        return reply

    def _start(self) -> socket.socket:
        if platform.system() != "Linux" or platform.machine() not in ARCHITECTURES or _kernel() < KERNEL:
            raise UserError(
                f"Model-written programs run on Linux {'.'.join(map(str, KERNEL))} or newer, on "
                f"{' or '.join(ARCHITECTURES)}; "
                f"this is {platform.system()} {platform.release()} on {platform.machine()}"
            )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mode = "apart" if self._namespaces else "limits"
        command = [sys.executable, "-P", "-s", "-S", str(Path(jail.__file__).parent / "__main__.py"), mode]
        with theirs:
            self._jail = subprocess.Popen(
                command,
                env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"},
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # Ctrl-C is handled by the parent
            )
        ours.settimeout(START)
        self._channel = ours
        try:
            reply = json.loads(ours.recv(1 << 16) or '{"refused": "it did not start"}')
        except OSError as error:
            reply = {"refused": str(error)}
        if "refused" in reply:
            self._close()
            raise UserError(f"No sandbox: {reply['refused']}. {WAY_OUT}")
        return ours

    def _close(self) -> None:
        channel = self._channel
        self._channel = None
        process = self._jail
        self._jail = None
        if channel is not None:
            channel.close()
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)  # it ends with the channel
            process.kill()  # its child processes die with it
            process.wait()


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])


def _memory(files: contextlib.ExitStack, contents: bytes | None = None) -> int:
    """Return a file in memory, sealed if it has contents."""
    file = os.memfd_create("mmopd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    files.callback(os.close, file)
    if contents is not None:
        with Path(f"/proc/self/fd/{file}").open("wb") as out:
            out.write(contents)
        fcntl.fcntl(
            file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        )
    return file


def _contents(file: int, most: int) -> bytes:
    with open(file, "rb", closefd=False) as stream:
        stream.seek(0)
        return stream.read(most)
