"""Model families that can be students, and their parts: vision tower, projector, language model. Some have the last
alone.

A student class has the name of its family's class: transformers looks up weight conversions by that name, and writes it
into exported configurations. Qwen3.5 mixes attention with gated delta nets, whose state would run on from one sample of
a row into the next, so each sample has its own row
([docs/decisions/014](../../docs/decisions/014-one-sample-a-row-for-linear-attention.md)).
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.utils.import_utils import is_flash_attn_2_available

from mmopd.config import Part
from mmopd.errors import CheckpointError, ConfigError
from mmopd.model_folder import NOT_FINITE, is_finite, load_config
from mmopd.train.families import FAMILIES, part_of
from mmopd.train.logprob import Student
from mmopd.train.pack import Layout
from mmopd.train.prefix_tree import with_key_index

STUDENTS: dict[str, type[Any]] = {
    kind: type(name, (Student, getattr(transformers, name)), {}) for kind, (_, name) in FAMILIES.items()
}
FUSED_EXPERTS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


def attention() -> str:
    """Return this machine's attention: flash_attention_2 (variable length, one row) if installed, else torch's."""
    return "flash_attention_2" if torch.cuda.is_available() and is_flash_attn_2_available() else "sdpa"


def load_student(folder: Path, dtype: torch.dtype, *, finite: bool = True) -> Any:
    """Load the student of a HF folder; while an HfDeepSpeedConfig exists, it is sharded as it is created.

    Args:
        folder: config, tokenizer and weights.
        dtype: type of the weights in memory.
        finite: refuse weights that are not finite. A replay loads them, to say which they are.

    Raises:
        CheckpointError: the folder cannot be loaded, lacks weights, or has some that are not finite.
        ConfigError: it holds a model family that has no student class.
    """
    kind = load_config(folder).model_type
    if kind not in STUDENTS:
        there = ", ".join(f"{kind} ({family})" for kind, (family, _) in FAMILIES.items())
        raise ConfigError(f"{folder}: no student class for model_type {kind!r}; known: {there}")
    AttentionInterface.register("flash_attention_2", with_key_index(flash_attention_forward))
    try:
        model, report = STUDENTS[kind].from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attention(),
            output_loading_info=True,
            use_safetensors=True,
        )
    except Exception as error:
        raise CheckpointError(f"{folder}: the weights cannot be loaded: {error}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise CheckpointError(f"{folder}: {len(wrong)} weights are missing or have another shape, such as {wrong[0]}")
    for name, weight in model.named_parameters() if finite else ():
        if not is_finite(getattr(weight, "ds_tensor", weight)):  # with ZeRO-3, the part of this rank
            raise CheckpointError(f"{folder}: the tensor {name!r} {NOT_FINITE}")
    return model


def layout(student: Any) -> Layout:
    """Return how micro-batches are laid out for a student.

    One sample per row if layers have a state that runs along the row, or a sliding window.
    """
    if set(getattr(student.config.get_text_config(), "layer_types", None) or ()) - {"full_attention"}:
        return "alone"
    return "flash" if student.config._attn_implementation == "flash_attention_2" else "masked"


def freeze(student: Any, parts: Collection[Part]) -> None:
    """Switch off the gradients of `parts`; below the lowest part that trains there is then no backward pass."""
    for name, weight in student.named_parameters():
        weight.requires_grad_(part_of(name) not in parts)


def as_checkpoint(student: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with the names and shapes of the family's published checkpoints, where the model's own differ.

    Args:
        weights: any of them, complete, by their names in the model.
    """
    # transformers 5.19 reads [experts, in, out], but does not convert back when it writes.
    if student.config.model_type == "qwen3_vl_moe":
        return {
            name: w.transpose(1, 2).contiguous() if name.endswith(FUSED_EXPERTS) else w for name, w in weights.items()
        }
    reverted: dict[str, Tensor] = revert_weight_conversion(student, dict(weights))
    return reverted
