"""Training processes seen from outside: start them, notice which one has failed and why, read what they have come
to.
"""

import json
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmopd.errors import KINDS, UserError, kind_of
from mmopd.runtime.network import HOST, free_port
from mmopd.runtime.processes import Child, Children
from mmopd.runtime.watchdog import HUNG, LAST, LATER, LEFT, TOGETHER, WAITED, pulse_of

COUNTS = {
    "kept": "kept",
    "masked": "masked",
    "absent": "failed",
    "unknown": "unknown",
}  # of responses, in the line of a step
DYING = 5.0  # seconds
NCCL_SAYS = b"Watchdog caught collective operation timeout"


def check_ranks(running: Sequence[Child], timeout: float, *, stopping: bool) -> None:
    """No rank has failed.

    Args:
        timeout: of the recipe; where a rank has waited for so long, the one that it has waited for is looked for.
        stopping: they have been asked to; one that was not ready to listen yet is not to blame.

    Raises:
        UserError: one has, of the kind that its exit status says; names the one that is to blame, with the last lines
            of its log.
    """
    fine = {None, 0, 128 + signal.SIGTERM} if stopping else {None, 0}
    if all(rank.returncode in fine for rank in running):
        return
    time.sleep(1.0)  # a rank that ends takes others with it, and they may be quicker
    begin = time.monotonic()
    while True:
        failed = [rank for rank in running if rank.returncode not in fine]
        causes = [rank for rank in failed if rank.returncode != LEFT and not _waited(rank)]
        # Its own watchdog ends a rank that hangs; one that the others say has ended is about to.
        patience = 2 * (LATER - TOGETHER) * timeout if any(map(_waited, failed)) else DYING
        if causes or time.monotonic() > begin + patience:
            break
        time.sleep(0.1)
    causes = causes or [rank for rank in running if rank.alive] or failed
    # One that knows why it ended, or else one that a signal ended.
    blamed = max(causes, key=lambda rank: (rank.returncode in {*KINDS, HUNG}, rank.returncode or 0))
    ended = (
        f"ended with status {blamed.returncode}"
        if not blamed.alive
        else f"has not answered for train.timeout = {timeout:.0f} s"
    )
    raise kind_of(blamed.returncode)(f"{blamed.name} {ended}; the last lines of {blamed.log}:\n{blamed.tail()}")


class Pulses:
    """Signs of life of ranks on this machine: what is stopped, or hangs in the kernel, cannot end itself, and nobody
    misses a single rank.

    Args:
        running: as `start_ranks` gave them; a launcher, whose ranks may be elsewhere, gives no sign and is not missed.
        timeout: of the recipe.
    """

    def __init__(self, running: Sequence[Child], timeout: float) -> None:
        self._timeout = timeout
        self._seen: dict[Child, tuple[int, float]] = dict.fromkeys(
            running, (0, math.inf)
        )  # rank -> its last sign, and when we saw it

    def check(self) -> None:
        """All that have given a sign still do.

        Raises:
            UserError: one does not; with the last lines of its log.
        """
        now = time.monotonic()
        for rank, (sign, since) in self._seen.items():
            pulse = pulse_of(rank.log)
            latest = pulse.stat().st_mtime_ns if pulse.exists() else 0
            if latest != sign:
                self._seen[rank] = latest, now
            elif rank.alive and now - since > LAST * self._timeout:
                silent = f"has given no sign of life for {now - since:.0f} s (train.timeout = {self._timeout:g})"
                raise UserError(f"{rank.name} {silent}; the last lines of {rank.log}:\n{rank.tail()}")


def _waited(rank: Child) -> bool:
    """Whether it has ended since another one did not come: it says so, or NCCL has ended it. [not run]"""
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
    """The processes of a module, all on this machine; or the one launcher that starts them, wherever it likes.

    Args:
        what: the module and its arguments.
        ranks: how many, on this machine.
        name: of a process and its log, before its number.
        launcher: a command that starts them.
        host: the address that servers listen on.
    """
    env = {
        "MASTER_PORT": str(free_port()),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if launcher:
        env["MASTER_ADDR"] = HOST if host == HOST else socket.gethostname()  # srun passes it on; others set their own
        return [children.start("launcher", [*launcher, *what], logs / "ranks.log", env)]
    env |= {"MASTER_ADDR": HOST, "WORLD_SIZE": str(ranks)}
    for n in range(ranks):
        pulse_of(logs / f"{name}{n}.log").unlink(missing_ok=True)
    return [
        children.start(
            f"{name}{n}",
            [sys.executable, "-m", *what],
            logs / f"{name}{n}.log",
            env | {"RANK": str(n), "LOCAL_RANK": str(n)},
        )
        for n in range(ranks)
    ]


def last_metrics(path: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics file; None while there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            whole, newline, _ = file.read().rpartition(b"\n")
    except FileNotFoundError:
        return None
    last: dict[str, Any] | None = json.loads(whole.rpartition(b"\n")[2]) if newline else None
    return last


def one_line(metrics: Mapping[str, Any]) -> str:
    """What a person wants to see of a step while it runs."""
    accuracy = "  ".join(
        f"{key.removeprefix('accuracy/')} {value:.2f}" for key, value in metrics.items() if key.startswith("accuracy/")
    )
    counts = "  ".join(f"{what} {metrics[key]:.0f}" for key, what in COUNTS.items() if key in metrics)
    learnt = f"return {metrics['return']:+.3f}" if "return" in metrics else f"loss {metrics.get('loss', math.nan):.3f}"
    right = f"right: {accuracy}  " if accuracy else ""
    return f"{metrics['seconds']:.1f} s/step  {learnt}  {right}{counts}"
