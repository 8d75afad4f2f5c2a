"""The proof after every weight sync: trainer and engine score the same answers, and must agree."""

from collections.abc import Sequence

from torch import Tensor

from mmopd.modality import Encoder
from mmopd.prompts.shards import Shards
from mmopd.rollout.engine import StudentEngine
from mmopd.train.tree import Item


def probe_items(sources: Sequence[Shards], encoder: Encoder) -> list[Item]:
    """The right answer to the first prompt of each source: text and images both, the same all through a run."""
    end = encoder.tokenizer.eos_token_id
    items = []
    for shards in sources:
        prompt = shards[0]
        tokens = (*encoder.tokenizer.encode(prompt.answer, add_special_tokens=False), end)
        items.append(Item.to_score(encoder.encode(prompt), tokens))
    return items


class ProbeError(RuntimeError):
    """Engine and trainer disagree: the engine must not be sampled from."""


async def probe(ours: Sequence[Tensor], engine: StudentEngine, items: Sequence[Item], tolerance: float) -> float:
    """Largest |log-prob of the trainer - log-prob of the engine| over the items' tokens.

    Args:
        ours: log-probs [T] of each item, by the trainer.

    Raises:
        EngineError: the engine does not answer.
        ProbeError: it exceeds `tolerance`: the engine does not have the trainer's weights, or computes something else.
    """
    theirs = [await engine.logprobs(item.encoded, item.tokens) for item in items]
    worst: float = max(abs(a - b) for mine, its in zip(ours, theirs, strict=True) for a, b in zip(mine.tolist(), its, strict=True))
    if not worst <= tolerance:
        raise ProbeError(
            f"after the weight sync, engine and trainer differ by {worst:.2e} in the log-prob of a token, and train.probe_tolerance is "
            f"{tolerance:.0e}: the engine does not hold the trainer's weights, or the two compute in different precision"
        )
    return worst
