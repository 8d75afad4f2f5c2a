"""Students: Qwen models whose head returns log-probs of given tokens; logits [T, V] never exist as a whole.

The head is `lm_head` itself with another class, so names, tying and ZeRO-3's gathering do not change. The chunked
log-softmax is Liger's (private there, hence pinned in the constraints and tested against the plain one).
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmopd.train.limits import CPU_CHUNK, GPU_CHUNK, ROWS

VOCABULARY_CHUNK = GPU_CHUNK if torch.cuda.is_available() else CPU_CHUNK


class LogprobHead(nn.Linear):
    """A linear head that can return float32 log-probs of `targets` instead of logits."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return logits [..., V] of hidden [..., H]; or log-probs of `targets` [M] or [M, K] for hidden [M, H]."""
        if targets is None:
            return super().forward(hidden)
        if targets.ndim == 2:
            some = zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
            return torch.cat([checkpoint(self._several, rows, ids, use_reentrant=False) for rows, ids in some])
        logprobs: Tensor = _ChunkedSelectiveLogProbFunction.apply(
            hidden, self.weight, targets, self.bias, 1.0, VOCABULARY_CHUNK
        )
        return logprobs

    def _several(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return log-probs [R, K] of targets [R, K].

        The logits of R rows exist while this runs, and again in the backward pass.
        """
        logits = super().forward(hidden).float()
        return logits.gather(1, targets) - logits.logsumexp(1, keepdim=True)


class Student:
    """Common part of the students: the log-prob head, and one call of the vision tower per forward pass."""

    lm_head: nn.Module
    model: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.lm_head.__class__ = LogprobHead

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return False, so that transformers applies the weight conversions of the family, found by class name."""
        return False

    def forward(
        self,
        *args: Any,
        logprob_index: Tensor | None = None,
        logprob_targets: Tensor | None = None,
        media_index: Mapping[str, Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the base class's forward; or return float32 log-probs of `logprob_targets` [M] or [M, K].

        Args:
            logprob_index: [M] rows of the flattened [B * W] hidden states that predict the targets.
            logprob_targets: [M] token ids.
            media_index: for each input of the model (`Medium.slot`) the row of `image_grid_thw` of each of its items in
                `input_ids`; `pixel_values` and `image_grid_thw` hold the items of all media, and one that many
                responses share is encoded once. None for a language model.
        """
        if logprob_targets is None or logprob_index is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if media_index is not None:
            kwargs["mm_encoder_outputs"] = self._see(
                kwargs.pop("pixel_values"), kwargs.pop("image_grid_thw"), media_index
            )
        hidden = self.model(*args, use_cache=False, **kwargs).last_hidden_state
        return self.lm_head(hidden.flatten(0, 1).index_select(0, logprob_index), logprob_targets)

    def _see(self, pixels: Tensor, grids: Tensor, media_index: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Return the vision tower's output for each input of the model."""
        seen = self.model.get_image_features(pixels, grids, return_dict=True)
        return {slot: _pick(seen, index) for slot, index in media_index.items() if index}


def _pick(seen: Any, index: Sequence[int]) -> Any:
    """Return the vision tower's output for these rows, in this order."""
    picked = copy(seen)
    picked.pooler_output = tuple(seen.pooler_output[i] for i in index)
    if getattr(seen, "deepstack_features", None) is not None:
        picked.deepstack_features = [tuple(level[i] for i in index) for level in seen.deepstack_features]
    return picked
