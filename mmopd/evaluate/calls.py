"""Calls of lmms-eval, each in a process forked from one that has imported it.

The import takes longer than many benchmarks.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Self

from mmopd.runtime.python import fork_server

PRELOAD = [f"{__package__}.preload"]


def warm_up() -> ForkServerContext:
    """Start the import in a process of its own, which ends with this thread; a later call finds the import done."""
    return fork_server(PRELOAD)


class Calls:
    """The lmms-eval calls of a `with` block; all are ended with the block, however it ends. Threads may share it."""

    def __init__(self) -> None:
        self._running: set[ForkServerProcess] = set()
        self._changing = threading.Lock()
        self._stopped = False

    def __enter__(self) -> Self:
        self._context = warm_up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changing:
            self._stopped = True
            for process in self._running:
                _kill(process)

    def run(
        self,
        arguments: Sequence[str],
        log: Path,
        env: Mapping[str, str],
        *,
        offline: bool,
        timeout: float,
        then: Callable[[], None] | None = None,
    ) -> int | None:
        """Run `python -m lmms_eval ARGUMENTS`.

        Args:
            log: file to which its output is appended.
            env: variables added to the environment.
            offline: send no request to the model hub.
            timeout: seconds.
            then: what the process does after lmms-eval; goes to it by pickle.

        Returns:
            The exit status, -n if signal n ended the call, or None if it did not end in time.

        Raises:
            RuntimeError: the block has ended already.
        """
        process = self._context.Process(
            target=_call,
            args=(list(arguments), str(log.absolute()), dict(env)),
            kwargs={"offline": offline, "folder": Path.cwd(), "then": then},
        )
        with self._changing:
            if self._stopped:
                raise RuntimeError("lmms-eval was not called: the other calls of the block have been stopped")
            process.start()
            self._running.add(process)
        # Not `join`: the start of a process in another thread reads the exit status of all that have ended, and of two
        # that read at once one gets nothing and reports 255. All that reads a status holds the lock.
        wait([process.sentinel], timeout)
        with self._changing:
            self._running.remove(process)
            late = process.is_alive()
            _kill(process)
            process.join()
            return None if late else process.exitcode


def _kill(process: ForkServerProcess) -> None:
    """Kill a process and all that it has started."""
    if process.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.kill()  # if it has no process group of its own yet


def _call(
    arguments: Sequence[str],
    log: str,
    env: Mapping[str, str],
    *,
    offline: bool,
    folder: Path,
    then: Callable[[], None] | None,
) -> None:
    """Run lmms-eval in the forked process, as `python -m lmms_eval` does."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(folder)
    os.environ.update(env)
    import datasets
    import huggingface_hub
    from lmms_eval.__main__ import cli_evaluate

    if offline:  # the environment variables were read at import, before the fork
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = (
            datasets.config.HF_DATASETS_OFFLINE
        ) = True
    sys.argv = ["lmms_eval", *arguments]
    cli_evaluate()
    if then is not None:
        then()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.killpg(0, signal.SIGKILL)
