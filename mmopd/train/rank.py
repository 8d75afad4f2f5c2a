"""One training rank: `python -m mmopd.train.rank RUN [SOURCE]...`.

The environment must hold RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. `mmopd train` starts the ranks of
one machine. On several machines any launcher that sets these variables can start them (torchrun, deepspeed; srun's own
variables are understood too), while `mmopd train --launcher` runs the servers. The SOURCEs are those that were added or
removed on purpose before a resume.
"""

import asyncio
import dataclasses
import logging
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch

from mmopd.config import Recipe
from mmopd.errors import ConfigError, UserError
from mmopd.runtime import logs
from mmopd.runtime.run_folder import RunFolder
from mmopd.runtime.watchdog import LEFT, TOGETHER, WAITED, Watchdog, asked_to_stop, pulse_of
from mmopd.serving import endpoint
from mmopd.train import distributed
from mmopd.train.distributed import Ranks
from mmopd.train.loop import train

logger = logging.getLogger("mmopd.train.rank")


def main() -> int:
    """Train, and return the exit status.

    A UserError ends with its message and the status of its kind. After a stop signal the rank finishes the current
    step, saves a checkpoint and returns 0.
    """
    logs.start(f"rank{distributed.own_rank()}")
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # several processes with more threads than cores slow each other down 20 times
    # The deepspeed launcher adds --local_rank in addition to LOCAL_RANK.
    folder, *changed = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank="))
    run = RunFolder(Path(folder))
    try:
        recipe = run.recipe()
        with asked_to_stop() as stop:
            return work(run, recipe, changed, stop)
    except UserError as error:
        logger.error("%s", error)
        return error.exit_status


def work(run: RunFolder, recipe: Recipe, changed: Sequence[str], stop: threading.Event) -> int:
    """Join the other ranks, train, and return the exit status.

    Raises:
        UserError: anything that a user can fix.
    """
    with joined(run, "rank", recipe.train.timeout) as (ranks, watchdog):
        students, _ = endpoint.load_by_role(run.endpoints)
        where = urlsplit(students[0].url).hostname or ""
        check_place(recipe.train.ranks, where, ranks.gather_objects((socket.gethostname(), is_here(where))))
        asyncio.run(train(run, recipe, ranks, changed=changed, stop=stop, watchdog=watchdog))
    return 0


@contextmanager
def joined(run: RunFolder, name: str, timeout: float) -> Iterator[tuple[Ranks, Watchdog]]:
    """Be one of the ranks while the block lasts; the exit status says whether another rank caused the end.

    `mmopd.runtime.rank_processes.check_ranks` reads that status.

    Args:
        name: of these processes and their logs, before the number.
        timeout: of the recipe.

    Raises:
        SystemExit: another rank did not join a collective in time, or ended during one.
    """
    ranks = distributed.start(TOGETHER * timeout)
    watchdog = Watchdog(ranks.rank, timeout, pulse_of(run.logs / f"{name}{ranks.rank}.log"))
    try:
        yield dataclasses.replace(ranks, beat=watchdog.beat), watchdog
    except RuntimeError as error:
        waited = distributed.waited_in_vain(error)
        if not (waited or distributed.was_left(error)):
            raise
        what = (
            f"did not come within {TOGETHER * timeout:.0f} s (train.timeout = {timeout:g})" if waited else "has ended"
        )
        logger.error("a collective operation has failed", exc_info=error)
        logger.error("rank %d, at %s: another one %s", ranks.rank, watchdog.where, what)
        raise SystemExit(WAITED if waited else LEFT) from None
    finally:
        distributed.stop()


def check_place(wanted: int, engine: str, places: Sequence[tuple[str, bool]]) -> None:
    """Check that there are as many ranks as the recipe says, on hosts where they can do their work.

    Args:
        wanted: train.ranks.
        engine: host of the student's engine.
        places: for each rank, in order: its host, and true if the engine's name belongs to that host.

    Raises:
        ConfigError: they cannot; raised on all ranks, with what to change.
    """
    hosts = list(dict.fromkeys(host for host, _ in places))
    if len(places) != wanted:
        raise ConfigError(
            f"the launcher has started {len(places)} ranks, and train.ranks is {wanted}: make them the same"
        )
    if engine in {"127.0.0.1", "localhost"} and len(hosts) > 1:
        raise ConfigError(
            f"ranks run on {', '.join(hosts)}, but the servers listen on one host only: use mmopd train --host 0.0.0.0"
        )
    if not places[0][1]:
        raise ConfigError(
            f"rank 0 is on {hosts[0]}, but the student's engine is on {engine}: rank 0 sends the weights through the "
            f"memory of one machine; put {engine} first in the launcher's list of hosts"
        )


def is_here(host: str) -> bool:
    """Return true if a name or an address belongs to this machine."""
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))  # a machine can bind only its own addresses
            return True
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
