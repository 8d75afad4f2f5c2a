"""Objectives, and the recipe as pure functions of tensors, without process group, HTTP or model.

The functions take a few values per response or token, on the CPU; losses and divergences also run on the model's
device. Names are imported when first used, so that settings can be read without torch.
"""

from typing import TYPE_CHECKING

from mmopd.lazy import importer

if TYPE_CHECKING:
    from mmopd.algorithm.advantage import grpo
    from mmopd.algorithm.balance import balance_online
    from mmopd.algorithm.base import Objective
    from mmopd.algorithm.clipped import clipped_loss
    from mmopd.algorithm.difficulty import difficulty_shape, difficulty_weights, drop_easy_weights, frontier_weights
    from mmopd.algorithm.divergence import forward_kl, jsd
    from mmopd.algorithm.likelihood import likelihood_loss, sft
    from mmopd.algorithm.margin import margin_mask, margin_shift, margins
    from mmopd.algorithm.reverse_kl import opd, targets_of
    from mmopd.algorithm.step import Step, Targets, Tokens, mean_weights
    from mmopd.algorithm.visual import visual_weights

__all__ = [
    "Objective",
    "Step",
    "Targets",
    "Tokens",
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
    "mean_weights",
    "opd",
    "sft",
    "targets_of",
    "visual_weights",
]

_MODULES = {
    "advantage": ("grpo",),
    "balance": ("balance_online",),
    "base": ("Objective",),
    "clipped": ("clipped_loss",),
    "difficulty": ("difficulty_shape", "difficulty_weights", "drop_easy_weights", "frontier_weights"),
    "divergence": ("forward_kl", "jsd"),
    "likelihood": ("likelihood_loss", "sft"),
    "margin": ("margin_mask", "margin_shift", "margins"),
    "reverse_kl": ("opd", "targets_of"),
    "step": ("Step", "Targets", "Tokens", "mean_weights"),
    "visual": ("visual_weights",),
}
__getattr__ = importer(__name__, {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names})
