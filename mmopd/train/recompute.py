"""The log-probs of a batch by the trainer itself, in the place of those of the engine that sampled it:
`train.old_logprobs: recompute`.
"""

from collections.abc import Sequence

import torch

from mmopd.records import Encoded, Sample
from mmopd.train.prefix_tree import Item
from mmopd.train.trainer import Trainer


def recompute(
    trainer: Trainer, samples: Sequence[Sample], prompts: Sequence[Encoded]
) -> tuple[list[torch.Tensor] | None, dict[str, float]]:
    """log pi_theta [T] of each sample's tokens, before the update, and by how much the engine's differ. Collective.

    Where one of them is not finite, none is used, but the engine's: the update meets the same, and is skipped and kept
    (`train.skipped`).

    Returns:
        the log-probs, or None; and as metrics: mismatch and mismatch_mean, the largest and the mean |trainer - engine|
        of a token, in nats.
    """
    old = trainer.logprobs([Item.to_score(prompts[s.group], s.response.tokens) for s in samples])
    gaps = (torch.cat(old) - torch.tensor([x for s in samples for x in s.response.logprobs])).abs()
    seen = {"mismatch": float(gaps.max()), "mismatch_mean": float(gaps.mean())} if gaps.numel() else {}
    return old if gaps.isfinite().all() else None, seen
