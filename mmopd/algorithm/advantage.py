"""GRPO: outcomes instead of teachers (recipe of Table B.1); the way to train teachers.

N responses, M tokens of all of them, S groups.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmopd.algorithm.groups import rows, same_length, sides
from mmopd.algorithm.step import Targets, mean_weights

EPSILON = 1e-6  # added to the standard deviation


def grpo(
    response: Int[Tensor, " M"], *, outcome: Float[Tensor, " N"], group: Int[Tensor, " N"], threshold: float
) -> Targets:
    """Return `A_i = (o_i - mean o) / (std o + 1e-6)` over the responses of a prompt, the same for each token.

    There is no KL and no entropy bonus. Soft outcomes are used without a cut. A response with an unknown outcome takes
    part in nothing, like one without a token. In a group of one response, or of equal outcomes, all advantages are 0;
    these responses still count in the mean over the responses.

    Args:
        response: which response the token belongs to, 0..N-1.
        outcome: 0 to 1, NaN unknown.
        group: number of the response's prompt, over all ranks.
        threshold: an outcome at or above it is right, for the diagnostics.

    Raises:
        ValueError: an outcome outside 0..1, or lengths that differ.
    """
    same_length(outcome=outcome, group=group)
    right, wrong = sides(outcome, threshold)
    N = len(outcome)
    T = torch.bincount(response, minlength=N)
    keep = (right | wrong) & (T > 0)
    row, S = rows(group)
    o = outcome[keep].double()
    row_kept = row[keep]
    count = torch.bincount(row_kept, minlength=S).clamp(min=1)
    mean = torch.bincount(row_kept, weights=o, minlength=S) / count
    # The sample standard deviation, as in GRPO; a single response has none, and equals its mean.
    std = (torch.bincount(row_kept, weights=(o - mean[row_kept]) ** 2, minlength=S) / (count - 1).clamp(min=1)).sqrt()
    advantage = torch.zeros(N, dtype=torch.float64)
    advantage[keep] = (o - mean[row_kept]) / (std[row_kept] + EPSILON)
    weight = mean_weights(T, keep, 1.0)
    known = {"correct_share": float(right[keep].double().mean()), "return_mean": float(o.mean())} if len(o) else {}
    return Targets(
        advantage=advantage.float()[response],
        token_weight=weight.float()[response],
        keep=keep,
        diagnostics={
            "responses": float(N),
            "responses_kept": float(keep.sum()),
            "two_sided_groups_before": float((std > 0).sum()),
        }
        | known,
    )
