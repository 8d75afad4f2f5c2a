"""Failures of a weight sync that end it, and failures that repeat it: an engine that lies, and one of several that is
lost.
"""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM
from torch import Tensor

from mmopd.modality import Encoder
from mmopd.records import Prompt
from mmopd.rollout.student_client import EngineError, StudentClient
from mmopd.rollout.sync import FRESH, SyncError
from mmopd.runtime.watchdog import Watchdog
from mmopd.train import distributed
from mmopd.train.prefix_tree import Item
from mmopd.train.trainer_thread import TrainerThread
from mmopd.train.weight_probe import ProbeError
from mmopd.train.weight_publisher import RECOVERIES, WeightPublisher


class Link:
    """A link to engines that take weights; the last engine restarts `deaths` times during a send."""

    def __init__(self, engines: int, deaths: int = 0) -> None:
        self.held, self.deaths, self.sent = [FRESH] * engines, deaths, list[bool]()

    def send(self, weights: Any, version: str, *, partial: bool) -> None:
        self.sent.append(partial)
        self.held = [version] * len(self.held)
        if self.deaths:
            self.deaths -= 1
            self.held[-1] = FRESH
            raise SyncError("student-2: it is dead")

    def versions(self) -> list[str]:
        return self.held

    def forget(self) -> None:
        """Do nothing: this link keeps no state."""


async def hand_over(encoder: Encoder, link: Link, *, off: float = 0.0) -> float:
    """Return the gap that the probe finds between engines and a trainer whose log-probs differ from theirs by `off`."""
    ranks = distributed.start(60)
    prompt = encoder.encode(Prompt("sums/0", "text_math", "text", ({"role": "user", "content": "1+8="},), (), "9"))
    item = Item.to_score(prompt, (40, 41, 42))
    try:
        async with AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(FakeVLLM(encoder)) for _ in link.held]
            engines = [await stack.enter_async_context(StudentClient(server.endpoint, encoder)) for server in servers]
            theirs = torch.tensor(await engines[0].logprobs(prompt, item.tokens))

            class Trainer:
                settings, keeps_some = SimpleNamespace(probe_tolerance=1e-4, timeout=60), True

                def named_weights(self, *, trained: bool) -> Iterator[tuple[str, Tensor]]:
                    return iter(())

                def logprobs(self, items: list[Item]) -> list[Tensor]:
                    return [theirs + torch.tensor([0.0, off, 0.0])]

            trainer: Any = Trainer()
            trainer.ranks = ranks
            publisher = WeightPublisher(
                trainer, engines, link, [item], TrainerThread(ranks, Watchdog(0, 60, Path()), ahead=False)
            )  # type: ignore[arg-type]
            return await publisher.publish("step-7")
    finally:
        distributed.stop()


def run(*arguments: Any, **named: Any) -> float:
    return asyncio.run(asyncio.wait_for(hand_over(*arguments, **named), 60))


def test_engines_that_agree_are_what_is_trained(encoder: Encoder) -> None:
    assert run(encoder, Link(2)) < 1e-6


@pytest.mark.parametrize(
    ("off", "told"), [(1e-3, r"differ by 1\.00e-03 in the log-prob of a token"), (float("nan"), "differ by nan")]
)
def test_an_engine_that_does_not_compute_what_the_trainer_does_ends_the_run(
    encoder: Encoder, off: float, told: str
) -> None:
    with pytest.raises(ProbeError, match=told):
        run(encoder, Link(2), off=off)


def test_where_one_of_several_engines_was_lost_all_get_everything_once_more(encoder: Encoder) -> None:
    link = Link(2, deaths=1)
    assert run(encoder, link) < 1e-6
    assert link.sent == [True, False], "partial, then everything"
    assert link.held == ["step-7"] * 2


def test_an_engine_that_dies_again_and_again_ends_the_run(encoder: Encoder) -> None:
    link = Link(2, deaths=99)
    with pytest.raises(
        EngineError, match=rf"it is dead\nthe engine was lost {RECOVERIES + 1} times on the way to step-7"
    ):
        run(encoder, link)
    assert link.sent == [True] + [False] * RECOVERIES
