"""Compute the log-probs of a batch by the trainer, in place of the engine's: `train.old_logprobs: recompute`."""

from collections.abc import Sequence

import torch

from mmopd.records import Encoded, Sample
from mmopd.train.prefix_tree import Item
from mmopd.train.trainer import Trainer


def recompute(
    trainer: Trainer, samples: Sequence[Sample], prompts: Sequence[Encoded]
) -> tuple[list[torch.Tensor] | None, dict[str, float]]:
    """Return log pi_theta [T] of each sample's tokens before the update, and the mismatch with the engine. Collective.

    If any value is not finite, the engine's log-probs are used: the update meets the same fault, and is skipped and
    kept (`train.skipped`).

    Returns:
        the log-probs, or None; and metrics: mismatch and mismatch_mean, the largest and the mean |trainer - engine| of
            a token, in nats.
    """
    old = trainer.logprobs([Item.to_score(prompts[s.group], s.response.tokens) for s in samples])
    gaps = (torch.cat(old) - torch.tensor([x for s in samples for x in s.response.logprobs])).abs()
    seen = {"mismatch": float(gaps.max()), "mismatch_mean": float(gaps.mean())} if gaps.numel() else {}
    return old if gaps.isfinite().all() else None, seen
