"""SFT on the teachers' answers: the off-policy baseline.

N responses, M tokens of all of them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmopd.algorithm.step import Targets, mean_weights


def sft(response: Int[Tensor, " M"], *, weight: Float[Tensor, " N"]) -> Targets:
    """Weigh tokens equally within a response, and responses by the weight of their teacher.

    Args:
        response: which response the token belongs to, 0..N-1.
        weight: w_k of the teacher that gave the answer.
    """
    N = len(weight)
    T = torch.bincount(response, minlength=N)
    keep = T > 0
    share = mean_weights(T, keep, weight)
    return Targets(
        advantage=torch.ones(len(response)),
        token_weight=share.float()[response],
        keep=keep,
        diagnostics={"responses": float(N), "responses_kept": float(keep.sum())},
    )


def likelihood_loss(logprob: Float[Tensor, " M"], weight: Float[Tensor, " M"]) -> Float[Tensor, ""]:
    """Return `-sum weight * log pi_theta`; a token of weight 0 has no effect, whatever its log-prob is."""
    return -(weight * torch.where(weight != 0, logprob, 0.0)).sum()
