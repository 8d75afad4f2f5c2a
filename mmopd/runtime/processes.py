"""Child processes that cannot outlive their parent: servers, training ranks.

Each command runs under two guards, one inside the other; both are tiny and use only the standard library (`python -I -S
processes.py PARENT COMMAND...`). A guard adopts every orphan among its descendants (PR_SET_CHILD_SUBREAPER), so that a
process cannot escape by daemonising. A guard ends the command when its own parent is gone (detected by a pidfd: no
polling, and no pipe that another process could hold open) or when it gets SIGTERM. Then it kills the rest of the
process tree. There are two guards because either may itself be killed with SIGKILL: the other one finishes the work.
The command has its own session, so that Ctrl-C in a terminal reaches only the parent, which stops its children in
order. Linux only.
"""

import contextlib
import ctypes
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

GRACE = 3.0  # seconds between SIGTERM and SIGKILL after the parent has gone
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # ask a run to stop; schedulers are told to send one of them
_STOP = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
_PR_SET_CHILD_SUBREAPER = 36


class Child:
    """A command under guard, started immediately; its output goes to `log`, its input is empty.

    Args:
        name: for messages.
        argv: the command.
        env: added to the environment of this process and that of `mmopd.runtime.python`.
        log: file to append to; its folder must exist.
    """

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        from mmopd.runtime import python  # the guards run this file, and find no package

        self.name = name
        self.log = log
        guard = [sys.executable, "-I", "-S", __file__, str(os.getpid()), *argv]
        with log.open("ab") as out:
            self.begin = out.tell()  # bytes of earlier processes in the log
            self._guard = subprocess.Popen(
                guard,
                env={**os.environ, **python.environment(), **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the outer guard; the command and its children are its descendants."""
        return self._guard.pid

    @property
    def alive(self) -> bool:
        """True while the command, or anything it started, still runs."""
        return self.returncode is None

    @property
    def returncode(self) -> int | None:
        """Exit status of the command, 128 + n if signal n ended it; None while it runs."""
        return self._guard.poll()

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait and return the exit status; None if the command still runs after `timeout` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._guard.wait(timeout)
        return self.returncode

    def terminate(self) -> None:
        """Ask the command to end; a second call kills the whole process tree."""
        if self.alive:
            self._guard.terminate()


def stop(children: Sequence[Child], grace: float = 10.0) -> None:
    """End the children in parallel, by force after `grace` seconds; on return none of their processes is left."""
    deadline = time.monotonic() + grace
    for child in children:
        child.terminate()
    for child in children:
        if child.wait(max(0.0, deadline - time.monotonic())) is None:
            child.terminate()
    for child in children:
        child.wait()


class Children:
    """Children of a `with` block: none is left when the block ends, however it ends. Threads may share it."""

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._starting = threading.Lock()
        self._stopped = False

    def __enter__(self) -> "Children":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()

    def __iter__(self) -> Iterator[Child]:
        return iter(self._children)

    def start(self, name: str, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Child:
        """Start a command under guard; see `Child`.

        Raises:
            RuntimeError: the children have already been stopped; a thread was too late.
        """
        with self._starting:
            if self._stopped:
                raise RuntimeError(f"{name}: not started, because its siblings have been stopped")
            child = Child(name, argv, env or {}, log)
            self._children.append(child)
        return child

    def stop_all(self, grace: float = 10.0) -> None:
        """Stop all children in parallel, and allow no new ones."""
        with self._starting:
            self._stopped = True
        stop(self._children, grace)


def guard_twice(watched: int | None, become: Callable[[], object]) -> int:
    """Run `become` under two guards, of which this process is the outer one; return its exit status.

    Args:
        watched: a pidfd; all ends with its process. None: that has ended already.
        become: what the command does; it does not return.
    """
    outer = os.getpid()

    def command() -> None:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGUSR1, signal.SIGUSR2):  # a scheduler may send them to every process
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores SIGPIPE, and a command would inherit that
        become()

    return _guard(watched, lambda: os._exit(_guard(_parent(outer), command)))


def _parent(pid: int) -> int | None:
    """Return a pidfd of the parent of this process; None if it has ended."""
    try:
        found = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    return found if os.getppid() == pid else None  # another process may have its number


def _guard(watched: int | None, start: Callable[[], None]) -> int:
    """Run `start` in a fork; return its exit status after all its descendants are gone.

    The fork is ended when the watched process ends or a signal asks for it.
    """
    if watched is None:
        return 128 + signal.SIGTERM
    wake, notify = os.pipe()
    os.set_blocking(notify, False)
    signal.set_wakeup_fd(notify)
    for number in (*_STOP, *STOPS, signal.SIGCHLD):
        signal.signal(number, _ignore)
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    poll.register(watched, select.POLLIN)
    child = os.fork()
    if child == 0:
        try:
            start()
        except BaseException:
            traceback.print_exc()
        os._exit(127)
    status = None
    deadline = None
    while status is None and (deadline is None or time.monotonic() < deadline):
        ready = [
            fd
            for fd, _ in poll.poll(
                None if deadline in (None, math.inf) else 1000 * max(0.0, deadline - time.monotonic())
            )
        ]
        asked = not _STOP.isdisjoint(os.read(wake, 4096)) if wake in ready else False
        if watched in ready:
            poll.unregister(watched)
        if asked or watched in ready:
            if deadline is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)
            again = asked and deadline is not None
            deadline = time.monotonic() + (0 if again else GRACE if watched in ready else math.inf)
        status = _reap(child)
    return _kill_descendants(child, status)


def _kill_descendants(child: int, status: int | None) -> int:
    """Kill until this process has no descendants; return the exit status of `child`."""
    while pids := _descendants(os.getpid()):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        ended = _reap(child)
        status = ended if status is None else status
    return 128 + signal.SIGKILL if status is None else status


def _reap(child: int) -> int | None:
    """Reap all children that have ended; return the exit status of `child` if it is among them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, code = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid == child:
                code = os.waitstatus_to_exitcode(code)
                status = code if code >= 0 else 128 - code
    return status


def _descendants(root: int) -> list[int]:
    """Return the process ids of all descendants of `root`, from /proc."""
    below: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # the process has just ended
                stat = Path(entry.path, "stat").read_text(encoding="utf-8", errors="replace")  # a name is any bytes
                below.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = list(below.get(root, []))
    for pid in found:  # the list grows during the loop
        found += below.get(pid, [])
    return found


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: the wake-up pipe tells the guard. A fork that executes a command loses this handler."""


if __name__ == "__main__":
    # At once: while Python shuts down, its handlers are gone, and a late SIGTERM would replace the status.
    os._exit(guard_twice(_parent(int(sys.argv[1])), lambda: os.execvp(sys.argv[2], sys.argv[2:])))
