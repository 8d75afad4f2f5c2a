"""Gives the engines the trainer's weights, proves by a probe that they have them, and starts over where one was lost on
the way.

An engine that dies is started again by its supervisor, with the weights of its folder and no version. It is waited for,
and gets everything once more. What it has sampled by then is told by its version, and refused (`rollout.collect`).
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

RECOVERIES = 3  # for one version; an engine that dies more often does not die by chance
LOOK_EVERY = 0.5  # seconds between two looks whether it is back


class WeightPublisher:
    """The weights on their way from the trainer to the student's engines. All methods are collective.

    Args:
        link: to the engines; on one rank, None on the others.
        probes: what trainer and engines both score after each sync.
        in_trainer_thread: where the trainer computes.
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
        self._lost = Counter[str]()  # how often, on the way to a version

    async def publish(self, version: str, *, everything: bool = False) -> float:
        """Give the engines the weights that updates change, or everything; the largest difference that the probe has
        found, in nats.

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
        """The engines are asked nothing until the next `publish`: one that shares a GPU with the trainer makes room, if
        it lives.
        """
        if self._link:
            with suppress(SyncError):  # `publish` meets the same, and has a way out
                self._link.sleep()

    async def wait_for_engine(self, version: str, error: Exception | None) -> None:
        """Go on once an engine that was lost has been started again; it has the weights of its folder then, and all
        answer.

        Args:
            version: that it is to have.
            error: by which this rank has noticed; None if others have.

        Raises:
            EngineError, ProbeError: they are the engines that we know, so that one has a fault; or one does not come
                back, or not for long.
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
        """The version of the engines that answer now, FRESH where one of them is; if not all do, or it is another
        rank's business: "".
        """
        try:
            versions = self._link.versions() if self._link else [""]
        except SyncError:
            return ""
        return FRESH if FRESH in versions else versions[0] or ""

    def _anybody(self, error: Exception | None) -> bool:
        """Whether any rank has an error."""
        return any(self._trainer.ranks.all_max([error is not None]))


def publish(
    trainer: Trainer, link: WeightSync[Any] | None, version: str, *, everything: bool = False
) -> SyncError | None:
    """All ranks gather the weights, and the one with a link sends them; what went wrong, on that one."""
    partial = trainer.keeps_some and not everything
    error = None
    weights = trainer.named_weights(trained=partial)
    if link is not None:
        try:
            link.send(weights, version, partial=partial)
        except SyncError as fault:
            error = fault
    for _ in weights:  # whoever does not send, or not to the end, gathers with the others
        pass
    return error
