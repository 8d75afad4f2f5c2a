"""A rollout whose engine is lost is repeated, with the weights that it should have had."""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from fake_vllm import FakeVLLM

from mmopd.config import Recipe
from mmopd.modality import Encoder
from mmopd.prompts.rows import RowError
from mmopd.records import Encoded, Prompt, Sample
from mmopd.rollout.collect import version_of
from mmopd.rollout.student_client import EngineError
from mmopd.rollout.sync import FRESH
from mmopd.runtime.run_folder import RunFolder
from mmopd.serving import endpoint
from mmopd.train import distributed
from mmopd.train.loop import open_rollouts
from mmopd.train.weight_publisher import WeightPublisher

STEP = 5


class Restarted(WeightPublisher):
    """Publishes weights to an engine that its supervisor has restarted: it has the weights of its folder, until it gets
    those of a version.
    """

    def __init__(self, engine: FakeVLLM) -> None:
        self.engine, self.waited = engine, 0
        engine.version = FRESH

    async def wait_for_engine(self, version: str, error: Exception | None) -> None:
        self.waited += 1
        if self.engine.version != FRESH:
            raise error or EngineError("it is the engine that we know")

    async def publish(self, version: str, *, everything: bool = False) -> float:
        self.engine.version = version
        return 0.0


@pytest.fixture(scope="module")
def prompts(encoder: Encoder) -> list[Encoded]:
    rows = [(n, ({"role": "user", "content": f"{n}+8="},)) for n in range(2)]
    return [encoder.encode(Prompt(f"sums/{n}", "text_math", "text", messages, (), f"{n + 8}")) for n, messages in rows]


class Stubborn(Restarted):
    """Publishes weights to an engine that names them wrongly."""

    async def publish(self, version: str, *, everything: bool = False) -> float:
        return await super().publish("of-somebody-else")


def no_others(asked: Mapping[int, Encoded], refused: Mapping[int, RowError]) -> dict[int, Encoded]:
    pytest.fail(f"refused: {refused}")


async def roll(
    folder: Path, encoder: Encoder, prompts: Sequence[Encoded], kind: type[Restarted], *, ahead: int
) -> tuple[list[Sample], Restarted, FakeVLLM]:
    """Roll out a step that begins on a fresh engine. Ahead: while the trainer updates, and its weight sync sends that
    engine its weights.
    """
    rollout = {"prompts": len(prompts), "group": 4, "max_tokens": 8, "async_steps": ahead}
    recipe = Recipe.model_validate(
        {"student": {"model": "m"}, "mixture": "m", "rollout": rollout, "algorithm": {"objective": {"kind": "grpo"}}}
    )
    run, ranks = RunFolder(folder), distributed.start(60)
    try:
        async with FakeVLLM(encoder) as engine:
            endpoint.save(run.endpoints, [dataclasses.replace(engine.endpoint, name="student", role="student")])
            async with open_rollouts(run, recipe, {}, encoder, ranks) as rollouts:
                publisher = kind(engine)
                rolling = rollouts.begin(STEP, prompts)
                if ahead:
                    assert (await rolling.end(ranks)).failed
                    await publisher.publish(version_of(STEP))
                _, samples, _ = await rollouts.finish(rolling, publisher, no_others)
                return samples, publisher, engine
    finally:
        distributed.stop()


@pytest.mark.parametrize(("ahead", "waited"), [(0, 1), (1, 0)])
def test_rollouts_of_an_engine_that_was_replaced_are_rolled_out_again(tmp_path, encoder, prompts, ahead, waited):
    samples, publisher, engine = asyncio.run(
        asyncio.wait_for(roll(tmp_path, encoder, prompts, Restarted, ahead=ahead), 60)
    )
    assert {version for sample in samples for version, _ in sample.response.versions} == {version_of(STEP)}
    assert [sample.group for sample in samples] == [n for n in range(len(prompts)) for _ in range(4)]
    assert publisher.waited == waited
    seeds = [request["sampling_params"]["seed"] for request in engine.requests]
    assert len(seeds) == 2 * len(prompts)
    assert sorted(seeds[: len(prompts)]) == sorted(seeds[len(prompts) :])


def test_an_engine_that_is_the_one_we_know_and_does_not_do_as_asked_ends_the_run(tmp_path, encoder, prompts):
    with pytest.raises(EngineError, match="sampled from weights 'of-somebody-else' in step 5"):
        asyncio.run(asyncio.wait_for(roll(tmp_path, encoder, prompts, Stubborn, ahead=1), 60))
