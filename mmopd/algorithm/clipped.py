"""The clipped policy loss, which most objectives use. M tokens."""

import torch
from jaxtyping import Float
from torch import Tensor


def clipped_loss(
    logprob: Float[Tensor, " M"],
    old: Float[Tensor, " M"],
    advantage: Float[Tensor, " M"],
    weight: Float[Tensor, " M"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, ""]:
    """Return `-sum weight * min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)`, rho = pi_theta / pi_old (PPO).

    This is the recipe of the paper. The weights of `opd` hold the mean over a response's tokens and the mean over the
    responses of all ranks, so the sums of micro-batches and ranks add up to the loss. A token of weight 0 has no
    effect, whatever its log-probs are.
    """
    rho = torch.where(weight != 0, logprob - old, 0.0).exp()
    gain = torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)
    return -(weight * gain).sum()
