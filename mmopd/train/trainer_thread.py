"""Run the trainer's work in this thread, or in a thread of its own while rollouts run ahead of it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import torch

from mmopd.runtime.watchdog import TRAINER, Watchdog
from mmopd.train.distributed import Ranks

P = ParamSpec("P")
T = TypeVar("T")


class TrainerThread:
    """Runs work of the trainer: `await in_trainer_thread(work, *arguments)` returns the result of `work`.

    With `ahead` the event loop runs meanwhile, so that requests go on. A context manager. Collectives stay in order,
    because each `work` is awaited before anything else of this rank begins.
    """

    def __init__(self, ranks: Ranks, watchdog: Watchdog, *, ahead: bool) -> None:
        self._watchdog = watchdog
        self._thread = ThreadPoolExecutor(1, TRAINER, initializer=_enter, initargs=(ranks.device,)) if ahead else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    async def __call__(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Run `work`, and wait for it."""
        if self._thread is None:
            return work(*arguments, **named)
        with self._watchdog.without_loop():
            return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *arguments, **named))


def _enter(device: Any) -> None:
    """Apply the per-thread settings of the main thread."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
