"""Divergences over the teacher's likeliest tokens (GKD's family), with all other tokens as one bucket.

At each position the teacher gives the log-probs of its K likeliest tokens. These, and the rest of the vocabulary as one
bucket, are a distribution over K + 1 outcomes for teacher and student alike. A divergence between the two is a lower
bound of the divergence over the vocabulary. Without the bucket, nothing would keep the student's mass inside the K.

There is no reverse KL here: it would have to weigh the student's mass in the bucket by log-probs that are unknown.

M tokens, K likeliest of each.
"""

import torch
from jaxtyping import Float
from torch import Tensor

NOTHING = -1e4  # log-prob of a place without a token: a mass of 0, and finite, so that 0 times it is 0
TINY = 1e-7  # least mass of the bucket: float32 cannot represent 1 - p better


def forward_kl(teacher: Float[Tensor, "M K"], student: Float[Tensor, "M K"]) -> Float[Tensor, " M"]:
    """Return `sum_k p_T (log p_T - log p)` over the K tokens and the bucket, in nats."""
    p = with_tail(teacher)
    q = with_tail(student)
    return (p.exp() * (p - q)).sum(-1)


def jsd(teacher: Float[Tensor, "M K"], student: Float[Tensor, "M K"], beta: float) -> Float[Tensor, " M"]:
    """Return the generalised Jensen-Shannon divergence in nats (GKD, Eq. 1).

    It is `beta KL(p_T | m) + (1 - beta) KL(p | m)` with `m = beta p_T + (1 - beta) p`.
    """
    p = with_tail(teacher)
    q = with_tail(student)
    m = torch.logaddexp(p + torch.tensor(beta).log(), q + torch.tensor(1 - beta).log())
    return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1)


def with_tail(logprob: Float[Tensor, "M K"]) -> Float[Tensor, "M K1"]:
    """Return the log-probs, followed by that of all other tokens together."""
    rest = (1 - logprob.exp().sum(-1, keepdim=True)).clamp(min=TINY)
    return torch.cat([logprob, rest.log()], -1)
