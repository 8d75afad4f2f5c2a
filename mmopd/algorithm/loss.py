"""The one place where the trainer meets the objective: a number to minimise from log-probs of a micro-batch."""

from jaxtyping import Float
from torch import Tensor

from mmopd.algorithm.dense import forward_kl, jsd
from mmopd.algorithm.objective import clipped_loss
from mmopd.algorithm.sft import likelihood_loss
from mmopd.config import SFT, Algorithm, Dense


def token_loss(
    logprob: Float[Tensor, " M"],
    old: Float[Tensor, " M"],
    advantage: Float[Tensor, " M"],
    weight: Float[Tensor, " M"],
    *,
    likeliest: tuple[Float[Tensor, "M K"], Float[Tensor, "M K"]] | None,
    settings: Algorithm,
) -> Float[Tensor, ""]:
    """The loss of M tokens, whose weights hold every mean: those of micro-batches and ranks add up.

    Args:
        logprob: of each token, by the student as it is now.
        old: the same, by the policy that sampled it.
        likeliest: log-probs by (teacher, student) of the teacher's K likeliest tokens, where the objective is dense.
    """
    objective = settings.objective
    if isinstance(objective, SFT):
        return likelihood_loss(logprob, weight)
    if isinstance(objective, Dense) and likeliest is not None:
        teacher, student = likeliest
        divergence = (
            forward_kl(teacher, student)
            if objective.divergence == "forward_kl"
            else jsd(teacher, student, objective.beta)
        )
        return (weight * divergence).sum()
    return clipped_loss(logprob, old, advantage, weight, clip_low=settings.clip_low, clip_high=settings.clip_high)
