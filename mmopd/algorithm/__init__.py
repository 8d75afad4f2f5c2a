"""The recipe as pure functions: tensors in, tensors out; no process group, no HTTP, no model.

They take a few numbers per response (`opd`: per token), on the CPU; `clipped_loss` alone runs where the model is.
"""

from mmopd.algorithm.balance import balance_online
from mmopd.algorithm.difficulty import difficulty_shape, difficulty_weights, drop_easy_weights, frontier_weights
from mmopd.algorithm.margin import margin_mask, margin_shift, margins
from mmopd.algorithm.objective import Targets, clipped_loss, opd
from mmopd.algorithm.visual import visual_weights

__all__ = [
    "Targets",
    "balance_online",
    "clipped_loss",
    "difficulty_shape",
    "difficulty_weights",
    "drop_easy_weights",
    "frontier_weights",
    "margin_mask",
    "margin_shift",
    "margins",
    "opd",
    "visual_weights",
]
