"""Input and output of an objective: a step, its targets, and the tokens of a micro-batch.

N responses of a step, M tokens of all of them, one response after the other.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmopd.algorithm.settings import Algorithm


@dataclass(frozen=True, slots=True)
class Step:
    """The responses of a step, over all ranks."""

    response: Int[Tensor, " M"]  # which response the token belongs to, 0..N-1
    student: Float[Tensor, " M"]  # log-prob of each token by the policy that sampled it, in nats
    teacher: Float[Tensor, " M"] | None  # the same by the teacher of its prompt; None where none is needed
    reference: Float[Tensor, " M"] | None  # the same by the teacher's reference, where the objective has references
    outcome: Float[Tensor, " N"]  # 1 right, 0 wrong, between cut at `outcome_threshold`, NaN unknown
    group: Int[Tensor, " N"]  # number of the response's prompt
    weight: Float[Tensor, " N"]  # w_k of the teacher that scored the response (Eq. 4); 1 without teachers
    settings: Algorithm
    seed: int  # of the run and the step


@dataclass(frozen=True, slots=True)
class Targets:
    """The result of an objective for one step, with diagnostics."""

    advantage: Float[Tensor, " M"]  # for OPD the calibrated token reward, in nats
    token_weight: Float[Tensor, " M"]  # includes every mean, as in `mean_weights`; 0 = not in the loss
    keep: Bool[Tensor, " N"]
    # A value that this step does not have (for example, without a group with both outcomes) has no key.
    diagnostics: dict[str, float] = field(default_factory=dict)
    # log pi_T - log pi_theta, summed over the counted tokens, if there is a teacher
    log_ratio: Float[Tensor, " N"] | None = None
    counted: Int[Tensor, " N"] | None = None  # number of these tokens


@dataclass(frozen=True, slots=True)
class Tokens:
    """The M response tokens of a micro-batch; over all micro-batches and ranks, the weights are those of the step."""

    logprob: Float[Tensor, " M"]  # by the current student; has a gradient
    old: Float[Tensor, " M"]  # by the policy that sampled them
    advantage: Float[Tensor, " M"]
    weight: Float[Tensor, " M"]
    # Log-probs by (teacher, student) of the teacher's K likeliest tokens, if the objective needs them. Places of tokens
    # that the student's head does not have are `divergence.NOTHING` in both: their mass belongs to the rest.
    likeliest: tuple[Float[Tensor, "M K"], Float[Tensor, "M K"]] | None


def mean_weights(
    counted: Int[Tensor, " N"], keep: Bool[Tensor, " N"], weight: Float[Tensor, " N"] | float
) -> Float[Tensor, " N"]:
    """Return the weight of each token of a response: `weight / (counted * kept responses)`, and 0 if not kept.

    With it, a sum over tokens is a mean over the tokens of a response, then over the responses of the step.

    Args:
        counted: counted tokens of each response.
        keep: responses that take part.
        weight: of each response.
    """
    return torch.where(keep, weight / (counted.clamp(min=1) * keep.sum().clamp(min=1)), 0.0)
