"""The recipe as pure functions: tensors in, tensors out; no process group, no HTTP, no model.

They take a few numbers per response or token, on the CPU; the losses and divergences alone run where the model is.
"""

from mmopd.algorithm.balance import balance_online
from mmopd.algorithm.dense import forward_kl, jsd
from mmopd.algorithm.difficulty import difficulty_shape, difficulty_weights, drop_easy_weights, frontier_weights
from mmopd.algorithm.grpo import grpo
from mmopd.algorithm.margin import margin_mask, margin_shift, margins
from mmopd.algorithm.objective import Targets, clipped_loss, opd
from mmopd.algorithm.sft import likelihood_loss, sft
from mmopd.algorithm.visual import visual_weights

__all__ = [
    "Targets",
    "balance_online",
    "clipped_loss",
    "difficulty_shape",
    "difficulty_weights",
    "drop_easy_weights",
    "forward_kl",
    "frontier_weights",
    "grpo",
    "jsd",
    "likelihood_loss",
    "margin_mask",
    "margin_shift",
    "margins",
    "opd",
    "sft",
    "visual_weights",
]
