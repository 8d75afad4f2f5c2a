"""Students: Qwen-VL models whose head answers with log-probs of given tokens; logits [T, V] never exist.

The head is `lm_head` itself under another class, so names, tying and ZeRO-3's gathering stay as they are. The
chunked log-softmax is Liger's (private there, hence pinned in the constraints and tested against the plain one).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction
from torch import Tensor, nn
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration
from transformers.utils.import_utils import is_flash_attn_2_available

from mmopd.errors import UserError

VOCABULARY_CHUNK = 4096  # columns of logits that exist at once, for up to 2,048 rows


class LogprobHead(nn.Linear):
    """A linear head that can answer with log-probs of `targets` in float32 instead of logits."""

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits [..., V] of hidden [..., H]; or log-probs [M] of targets [M] for hidden [M, H]."""
        if targets is None:
            return super().forward(hidden)
        logprobs: Tensor = _ChunkedSelectiveLogProbFunction.apply(hidden, self.weight, targets, self.bias, 1.0, VOCABULARY_CHUNK)
        return logprobs


class _Student:
    """What the students share: the log-prob head, and one call of the vision tower per forward pass."""

    lm_head: nn.Module
    model: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.lm_head.__class__ = LogprobHead

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that transformers applies the weight conversions of the family, which it finds by class name."""
        return False

    def forward(
        self,
        *args: Any,
        logprob_index: Tensor | None = None,
        logprob_targets: Tensor | None = None,
        image_index: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base class's forward, or, with `logprob_targets` [M], their float32 log-probs [M].

        Args:
            logprob_index: [M] rows of the flattened [B * W] hidden states that predict the targets.
            logprob_targets: [M] token ids.
            image_index: the row of `image_grid_thw` of each image in `input_ids`; an image that many responses share is encoded once.
        """
        if logprob_targets is None or logprob_index is None or image_index is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        images = self.model.get_image_features(kwargs.pop("pixel_values"), kwargs.pop("image_grid_thw"), return_dict=True)
        images.pooler_output = tuple(images.pooler_output[i] for i in image_index)
        if getattr(images, "deepstack_features", None) is not None:
            images.deepstack_features = [tuple(level[i] for i in image_index) for level in images.deepstack_features]
        hidden = self.model(*args, mm_encoder_outputs={"image": images}, use_cache=False, **kwargs).last_hidden_state
        return self.lm_head(hidden.flatten(0, 1).index_select(0, logprob_index), logprob_targets)


# A student has the name of its family's class: transformers looks up weight conversions by it, and writes it into exported configurations.
STUDENTS: dict[str, type[Any]] = {
    kind: type(family.__name__, (_Student, family), {})
    for kind, family in {"qwen3_vl": Qwen3VLForConditionalGeneration, "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration}.items()
}


def attention() -> str:
    """The attention of this machine: flash_attention_2 (variable length, one row) where it is installed, else torch's own."""
    return "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"


def load_student(folder: Path, dtype: torch.dtype) -> Any:
    """The student of a HF folder; under a live HfDeepSpeedConfig it is sharded at birth.

    Raises:
        UserError: the folder cannot be loaded, lacks weights, or holds a model family that has no student class.
    """
    try:
        kind = AutoConfig.from_pretrained(folder).model_type
    except Exception as error:
        raise UserError(f"{folder}: no model configuration can be read from this folder: {error}") from error
    if kind not in STUDENTS:
        raise UserError(f"{folder}: no student class for model_type {kind!r}; there is {', '.join(STUDENTS)}")
    try:
        model, report = STUDENTS[kind].from_pretrained(folder, dtype=dtype, attn_implementation=attention(), output_loading_info=True)
    except Exception as error:
        raise UserError(f"{folder}: the weights cannot be loaded: {error}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise UserError(f"{folder}: {len(wrong)} weights are missing or have another shape, such as {wrong[0]}")
    return model
