"""Shared by the tests of scoring: prompts and an encoder of the demo world, runs of a scorer, and the sum of counts."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from fake_vllm import FakeVLLM

from mmopd.config import Fleet
from mmopd.demo.world import build_processor
from mmopd.modality import Encoder
from mmopd.records import Absent, Encoded, Prompt, Score
from mmopd.task import Task
from mmopd.teacher.scorer import Scorer

TOKENS = (5, 6, 7, 8)


def prompt(row: dict[str, Any], modality: str, key: str = "p/0", **extra: str) -> Prompt:
    """Return a row of the demo as a prompt."""
    messages, images = tuple(row["messages"]), tuple(row["images"])
    return Prompt(key, f"{modality}_task", modality, messages, images, row["answer"], extra)


def processor_encoder(folder: Path) -> Encoder:
    """Write the processor of the demo's student to the folder, and return an encoder with it."""
    build_processor().save_pretrained(folder)
    return Encoder(folder)


def balances(counts: Mapping[str, int], n: int) -> bool:
    """Return whether the counts of a scorer account for each of n calls and for each request."""
    absent = sum(v for k, v in counts.items() if k.startswith("absent/"))
    failed = sum(v for k, v in counts.items() if k.startswith("failed/"))
    sent = counts["requests"] - failed - counts["cancelled"]
    return counts["asked"] == n == counts["scored"] + absent and sent == counts["answers"] - counts["reused"]


def fleet(routes: list[dict[str, Any]], **teachers: dict[str, Any]) -> Fleet:
    """Return a fleet with these teachers and their settings."""
    each = {name: {"endpoints": [f"http://{name}"], **settings} for name, settings in teachers.items()}
    return Fleet.model_validate({"teachers": each, "routes": routes})


def one(encoded: Encoded, tokens: Sequence[int] = TOKENS, **how: Any) -> Callable[[Scorer], Awaitable[Score | Absent]]:
    """Return the work, for `run`, of scoring one response."""
    return lambda scorer: scorer.score(encoded, tokens, **how)


def run(
    work: Callable[[Scorer], Awaitable[Any]],
    fleet: Fleet,
    servers: Mapping[str, Sequence[FakeVLLM]],
    encoder: Encoder,
    tasks: Mapping[str, Task] | None = None,
    **settings: Any,
) -> tuple[Any, Mapping[str, int]]:
    """Run the servers of each teacher. Returns (the result of `work(scorer)`, counts)."""

    async def main() -> tuple[Any, Mapping[str, int]]:
        async with AsyncExitStack() as stack:
            for server in {id(s): s for group in servers.values() for s in group}.values():
                await stack.enter_async_context(server)
            endpoints = {name: [server.endpoint for server in group] for name, group in servers.items()}
            scorer = await stack.enter_async_context(Scorer(fleet, tasks or {}, endpoints, encoder, **settings))
            return await work(scorer), scorer.counts

    return asyncio.run(asyncio.wait_for(main(), 120))
