"""Verifiers in processes of their own, which run during the rollout.

A verifier judges text that a model wrote: it may loop, exhaust memory or kill its process. Each worker is one process,
which is killed when its time is up and started again when it is next needed. A failed verifier gives an unknown outcome
with a reason, never a wrong one.
"""

import asyncio
import json
import math
import os
import queue
import select
import subprocess
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from mmopd.errors import ConfigError
from mmopd.records import UNKNOWN, Outcome
from mmopd.runtime import python
from mmopd.settings_file import suggest
from mmopd.task.base import Task
from mmopd.task.load import load_tasks, tasks_of

START = 1800.0  # seconds for a worker to load the tasks; a worker that ends is noticed at once


class VerifierPool:
    """Judges answers by task name, up to `workers` in parallel.

    Args:
        workspace: folder whose tasks take precedence over the shipped ones.
        module: a module with a mapping `TASKS`, which takes the place of the catalogue.
        workers: number of processes.
        timeout: seconds for one answer, for tasks without a timeout of their own.

    Raises:
        ConfigError: a file of modalities/ does not load.
    """

    def __init__(
        self, workspace: Path | None = None, *, module: str = "", workers: int = 2, timeout: float = 10.0
    ) -> None:
        self.tasks: Mapping[str, Task] = tasks_of(module) if module else load_tasks(workspace)
        self._timeout = timeout
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")
        self._all = [_Worker(workspace, module) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._all:
            self._idle.put(worker)

    def submit(self, task: str, response: str, answer: str) -> Future[Outcome]:
        """Queue one answer.

        Raises:
            ConfigError: no such task.
        """
        if task not in self.tasks:
            raise ConfigError(f"no task {task!r} in modalities/{suggest(task, self.tasks)}")
        return self._threads.submit(self._ask, task, response, answer)

    async def verify(self, task: str, response: str, answer: str) -> Outcome:
        """Judge one answer without blocking the event loop."""
        return await asyncio.wrap_future(self.submit(task, response, answer))

    def close(self) -> None:
        """Drop queued answers and end the processes."""
        for worker in self._all:
            worker.stop()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._all:
            worker.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, task: str, response: str, answer: str) -> Outcome:
        worker = self._idle.get()
        try:
            return worker.ask(task, response, answer, self.tasks[task].timeout or self._timeout)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process of `mmopd.task.verifier_worker`; questions and answers are lines of JSON."""

    def __init__(self, workspace: Path | None, module: str) -> None:
        where = ["--module", module] if module else [str(workspace)] if workspace else []
        self._command = python.command("-m", "mmopd.task.verifier_worker", *where)
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = False

    def ask(self, task: str, response: str, answer: str, timeout: float) -> Outcome:
        if self._process is None:
            self._start()
        line = json.dumps([task, response, answer, timeout]).encode() + b"\n"
        try:
            reply = self._exchange(line, timeout)
        except TimeoutError:
            self.kill()
            return Outcome(UNKNOWN, "timeout")
        except EOFError:
            self.kill()
            return Outcome(UNKNOWN, "verifier process died")
        value, reason = json.loads(reply)
        return Outcome(math.nan if value is None else value, reason)

    def stop(self) -> None:
        """Stop the answer in progress, from another thread."""
        self._closing = True
        if (process := self._process) is not None:
            process.kill()

    def kill(self) -> None:
        """End the process; the next question starts another one."""
        process = self._process
        self._process = None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> None:
        if self._closing:
            raise RuntimeError("the pool is closed")
        self._process = subprocess.Popen(
            self._command, env=os.environ | python.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            self._exchange(b"", START)
        except (TimeoutError, EOFError):
            self.kill()
            raise RuntimeError(f"a verifier process did not start: {' '.join(self._command)}") from None

    def _exchange(self, line: bytes, timeout: float) -> bytes:
        """Send a line and wait for one; raise EOFError if the process is gone."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except OSError as error:
            raise EOFError from error
        poll = select.poll()  # `select` refuses files with numbers above 1,023
        poll.register(process.stdout, select.POLLIN)
        if not poll.poll(timeout * 1000):
            raise TimeoutError
        reply = process.stdout.readline()
        if not reply.endswith(b"\n"):
            raise EOFError
        return reply
