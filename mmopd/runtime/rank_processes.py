"""Training processes seen from the launcher: start them, find the one that failed and the cause, read their metrics."""

import math
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmopd.errors import KINDS, UserError, kind_of
from mmopd.runtime import python
from mmopd.runtime.causes import why
from mmopd.runtime.network import HOST, free_port
from mmopd.runtime.processes import STOPS, Child, Children
from mmopd.runtime.step_lines import parse
from mmopd.runtime.watchdog import HUNG, LAST, LATER, LEFT, TOGETHER, WAITED, pulse_of

DYING = 30.0  # seconds in which a rank that is ending must be gone, on a busy machine too
LAST_BYTES = 65536  # of a metrics file, in which its last line is looked for first
NCCL_SAYS = b"Watchdog caught collective operation timeout"


def check_ranks(running: Sequence[Child], timeout: float, *, stopping: bool) -> None:
    """Check that no rank has failed.

    Args:
        running: the ranks.
        timeout: train.timeout of the recipe; after it, a rank that waited blames the one that it waited for.
        stopping: the ranks have been asked to stop; one that was not ready for the signal yet is not to blame.

    Raises:
        UserError: a rank has failed. The error has the kind of its exit status, names the rank that is to blame, and
            has its error or, without one, the last lines of its log.
    """
    fine = {None, 0, *(128 + number for number in STOPS)} if stopping else {None, 0}
    if all(rank.returncode in fine for rank in running):
        return
    time.sleep(1.0)  # a rank that ends takes others with it, and they may end first
    begin = time.monotonic()
    while True:
        failed = [rank for rank in running if rank.returncode not in fine]
        causes = [rank for rank in failed if rank.returncode != LEFT and not _waited(rank)]
        # A rank that hangs is ended by its own watchdog; a rank that has left, as the others report, is about to end.
        patience = 2 * (LATER - TOGETHER) * timeout if any(map(_waited, failed)) else DYING
        if causes or time.monotonic() > begin + patience:
            break
        time.sleep(0.1)
    causes = causes or [rank for rank in running if rank.alive] or failed
    # Prefer a rank that knows why it ended, then one that a signal ended.
    blamed = max(causes, key=lambda rank: (rank.returncode in {*KINDS, HUNG}, rank.returncode or 0))
    ended = (
        f"ended with status {blamed.returncode}"
        if not blamed.alive
        else f"has not answered for train.timeout = {timeout:.0f} s"
    )
    killed = blamed.returncode is None or blamed.returncode > 128
    raise kind_of(blamed.returncode)(f"{blamed.name} {ended}; {why(blamed.log, blamed.begin, by_signal=killed)}")


class Pulses:
    """Signs of life of ranks on this machine.

    A process that is stopped, or hangs in the kernel, cannot end itself, and with a single rank no other rank notices.

    Args:
        running: children from `start_ranks`; a launcher, whose ranks may run on other machines, gives no sign and is
            not checked.
        timeout: train.timeout of the recipe.
    """

    def __init__(self, running: Sequence[Child], timeout: float) -> None:
        self._timeout = timeout
        # Rank -> its last sign of life, and the time when it was seen.
        self._seen: dict[Child, tuple[int, float]] = dict.fromkeys(running, (0, math.inf))

    def check(self) -> None:
        """Check that every rank that has given a sign of life still does.

        Raises:
            UserError: a rank does not; the message has the last lines of its log.
        """
        now = time.monotonic()
        for rank, (sign, since) in self._seen.items():
            pulse = pulse_of(rank.log)
            latest = pulse.stat().st_mtime_ns if pulse.exists() else 0
            if latest != sign:
                self._seen[rank] = latest, now
            elif rank.alive and now - since > LAST * self._timeout:
                silent = f"has given no sign of life for {now - since:.0f} s (train.timeout = {self._timeout:g})"
                raise UserError(f"{rank.name} {silent}; {why(rank.log, rank.begin, by_signal=True)}")


def _waited(rank: Child) -> bool:
    """Return true if the rank ended because another did not come: by its exit status, or ended by NCCL. [not run]"""
    aborted = rank.returncode == 128 + signal.SIGABRT
    return rank.returncode == WAITED or (aborted and NCCL_SAYS in rank.log.read_bytes())


def start_ranks(
    what: Sequence[str],
    ranks: int,
    logs: Path,
    children: Children,
    *,
    name: str = "rank",
    launcher: Sequence[str] = (),
    host: str = HOST,
) -> list[Child]:
    """Start the processes of a module on this machine, or the one launcher that starts them anywhere.

    Args:
        what: the module and its arguments.
        ranks: number of processes on this machine.
        logs: folder of the logs.
        children: owner of the processes.
        name: name of a process and its log, without the number.
        launcher: a command that starts the ranks.
        host: address that servers listen on.
    """
    env = {
        "MASTER_PORT": str(free_port()),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if launcher:
        # Srun passes it on; other launchers set their own.
        env["MASTER_ADDR"] = HOST if host == HOST else socket.gethostname()
        return [children.start("launcher", [*launcher, *what], logs / "ranks.log", env)]
    env |= {"MASTER_ADDR": HOST, "WORLD_SIZE": str(ranks)}
    for n in range(ranks):
        pulse_of(logs / f"{name}{n}.log").unlink(missing_ok=True)
    return [
        children.start(
            f"{name}{n}",
            python.command("-m", *what),
            logs / f"{name}{n}.log",
            env | {"RANK": str(n), "LOCAL_RANK": str(n)},
        )
        for n in range(ranks)
    ]


def last_metrics(path: Path) -> dict[str, Any] | None:
    """Return the last complete line of a metrics file; None if there is none.

    Raises:
        DataError: the line is damaged.
    """
    if not path.exists():
        return None
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        window = LAST_BYTES
        while True:
            file.seek(max(0, size - window))
            whole, newline, _ = file.read(min(size, window)).rpartition(b"\n")
            _, before, line = whole.rpartition(b"\n")
            if before or window >= size:
                return parse(path, line) if newline else None
            window *= 8  # a longer line
