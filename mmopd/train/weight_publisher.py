"""Send the trainer's weights to the engines, check them with a probe, and start over if an engine was lost on the way.

The supervisor restarts an engine that dies; it then has the weights of its folder and no version. The publisher waits
for it and sends all weights again. Responses that it sampled in between have another version, and are refused
(`rollout.collect`).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from mmopd.rollout.student_client import EngineError, StudentClient
from mmopd.rollout.sync import FRESH, SyncError, WeightSync
from mmopd.train.prefix_tree import Item
from mmopd.train.trainer import Trainer
from mmopd.train.trainer_thread import TrainerThread
from mmopd.train.weight_probe import ProbeError, probe

RECOVERIES = 3  # for one version; an engine that dies more often has a fault
LOOK_EVERY = 0.5  # seconds between two checks of whether it is back


class WeightPublisher:
    """Sends weights from the trainer to the student's engines. All methods are collective.

    Args:
        link: to the engines; None on all ranks but one.
        probes: what trainer and engines both score after each sync.
        in_trainer_thread: runs the trainer's work.
    """

    def __init__(
        self,
        trainer: Trainer,
        engines: Sequence[StudentClient],
        link: WeightSync[Any] | None,
        probes: Sequence[Item],
        in_trainer_thread: TrainerThread,
    ) -> None:
        self._trainer = trainer
        self._engines = engines
        self._link = link
        self._probes = probes
        self._in_trainer_thread = in_trainer_thread
        self._lost = Counter[str]()  # engines lost, by the version on the way

    async def publish(self, version: str, *, everything: bool = False) -> float:
        """Send the engines the weights that updates change, or all; return the probe's largest difference, in nats.

        Raises:
            EngineError: an engine does not take the weights, or one was lost more than RECOVERIES times.
            ProbeError: engine and trainer disagree.
        """
        while True:
            error: Exception | None = await self._in_trainer_thread(
                publish, self._trainer, self._link, version, everything=everything
            )
            gap = 0.0
            if not self._anybody(error):
                ours = await self._in_trainer_thread(self._trainer.logprobs, self._probes)
                try:
                    gap = await probe(ours, self._engines, self._probes, self._trainer.settings.probe_tolerance)
                except (EngineError, ProbeError) as fault:
                    error = fault
                if not self._anybody(error):
                    return gap
            await self.wait_for_engine(version, error)
            everything = True

    def sleep_engine(self) -> None:
        """Let an engine that shares a GPU with the trainer free its memory, until the next `publish`."""
        if self._link:
            with suppress(SyncError):  # `publish` meets the same error, and handles it
                self._link.sleep()

    async def wait_for_engine(self, version: str, error: Exception | None) -> None:
        """Wait until a lost engine has been restarted and all engines answer; it then has the weights of its folder.

        Args:
            version: that it must get.
            error: that showed the loss on this rank; None if only other ranks noticed.

        Raises:
            EngineError, ProbeError: no engine was restarted, so one has a fault; or one does not come back, or keeps
                dying.
        """
        ranks = self._trainer.ranks
        until = time.monotonic() + self._trainer.settings.timeout
        said = next(text for text in ranks.gather_objects(str(error) if error else "") if text)
        self._lost[version] += 1
        if self._lost[version] > RECOVERIES:
            raise EngineError(f"{said}\nthe engine was lost {self._lost[version]} times on the way to {version}")
        while True:
            found = ranks.gather_objects(self._look())[0]
            if found == FRESH:
                if self._link:
                    self._link.forget()
                return
            if found:
                raise error or EngineError(said)
            if any(ranks.all_max([time.monotonic() > until])):
                raise EngineError(
                    f"{said}\nthe engine has not come back within train.timeout = {self._trainer.settings.timeout} s"
                )
            await asyncio.sleep(LOOK_EVERY)

    def _look(self) -> str:
        """Return the engines' version, FRESH if one was restarted; "" on other ranks, or if not all engines answer."""
        try:
            versions = self._link.versions() if self._link else [""]
        except SyncError:
            return ""
        return FRESH if FRESH in versions else versions[0] or ""

    def _anybody(self, error: Exception | None) -> bool:
        """Return true if any rank has an error."""
        return any(self._trainer.ranks.all_max([error is not None]))


def publish(
    trainer: Trainer, link: WeightSync[Any] | None, version: str, *, everything: bool = False
) -> SyncError | None:
    """Gather the weights on all ranks and send them from the rank with a link, which returns the error, if any."""
    partial = trainer.keeps_some and not everything
    error = None
    weights = trainer.named_weights(trained=partial)
    if link is not None:
        try:
            link.send(weights, version, partial=partial)
        except SyncError as fault:
            error = fault
    for _ in weights:  # ranks that do not send, or stopped, still take part in gathering
        pass
    return error
