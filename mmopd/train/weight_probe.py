"""Check every weight sync: trainer and engine score the same answers, and must agree."""

import asyncio
from collections.abc import Sequence

import torch
from torch import Tensor

from mmopd.errors import DataError
from mmopd.modality import Encoder
from mmopd.modality.registry import check_items
from mmopd.prompts.prompt_plan import MAX_BAD
from mmopd.prompts.rows import RowError
from mmopd.prompts.shards import Shards
from mmopd.records import Prompt
from mmopd.rollout.student_client import PromptRefusedError, StudentClient
from mmopd.train.prefix_tree import Item


def probe_items(sources: Sequence[Shards], encoder: Encoder) -> list[Item]:
    """Return the right answer to the first usable prompt of each source; the same items throughout a run.

    Raises:
        DataError: none of the first prompts of a source can be used; names the source and the last cause.
    """
    return [_first_usable(shards, encoder) for shards in sources]


def to_probe(prompt: Prompt, encoder: Encoder) -> Item:
    """Return the right answer to a prompt as an item that only needs log-probs."""
    return Item.to_score(encoder.encode(prompt), encoder.encode_answer(prompt.answer))


def _first_usable(shards: Shards, encoder: Encoder) -> Item:
    tried = min(MAX_BAD, len(shards))
    last: Exception | None = None
    for row in range(tried):
        try:
            prompt = shards[row]
            check_items(prompt)
            return to_probe(prompt, encoder)
        except (RowError, ValueError) as error:
            last = error
    raise DataError(f"source {shards.name!r}: none of its first {tried} rows can be used; the last one: {last}")


class ProbeError(Exception):
    """Engine and trainer disagree: the engine must not be sampled from."""


async def probe(
    ours: Sequence[Tensor], engines: Sequence[StudentClient], items: Sequence[Item], tolerance: float
) -> float:
    """Return the largest |log-prob by the trainer - log-prob by an engine| over the items' tokens.

    An item whose prompt an engine refuses is not compared; it is replaced and counted when it is drawn.

    Args:
        ours: log-probs [T] of each item by the trainer.

    Raises:
        EngineError: an engine does not answer, or refuses every prompt.
        ProbeError: the difference exceeds `tolerance`: an engine has other weights than the trainer, or computes
            something else.
    """

    async def ask(engine: StudentClient) -> Tensor:
        differences: list[Tensor] = []
        refused: list[PromptRefusedError] = []
        for mine, item in zip(ours, items, strict=True):
            try:
                differences.append(mine - mine.new_tensor(await engine.logprobs(item.encoded, item.tokens)))
            except PromptRefusedError as error:
                refused.append(error)
        if not differences:
            raise refused[0]
        return torch.cat(differences)

    worst = float(torch.cat(await asyncio.gather(*map(ask, engines))).abs().max())  # NaN if any is
    if not worst <= tolerance:
        raise ProbeError(
            f"after the weight sync, engine and trainer differ by {worst:.2e} in the log-prob of a token, and "
            f"train.probe_tolerance is {tolerance:.0e}: the engine does not hold the trainer's weights, or the two "
            "compute in different precision"
        )
    return worst
