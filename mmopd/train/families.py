"""Model families that can be students, and the parts of their weights. This module loads no torch."""

from collections.abc import Sequence

from mmopd.config import Lora, Part
from mmopd.errors import ConfigError

FAMILIES = {  # model_type -> name of the family, class in transformers
    "qwen3_vl": ("Qwen3-VL", "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": ("Qwen3-VL-MoE", "Qwen3VLMoeForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_5": ("Qwen3.5", "Qwen3_5ForConditionalGeneration"),
    "qwen3_5_moe": ("Qwen3.5-MoE", "Qwen3_5MoeForConditionalGeneration"),
    # Language models, without a vision tower.
    "qwen3": ("Qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": ("Qwen3-MoE", "Qwen3MoeForCausalLM"),
}
PROJECTOR = ("model.visual.merger.", "model.visual.deepstack_merger_list.")


def part_of(name: str) -> Part:
    """Return the part of a student that a weight or module belongs to, by its full name; the head is language."""
    if name.startswith(PROJECTOR):
        return "projector"
    return "vision" if name.startswith("model.visual.") else "language"


def unit(name: str) -> str:
    """Return the module whose weights an engine may fuse: `...self_attn` for `...self_attn.q_proj.weight`.

    Its weights are sent together, or not at all.
    """
    return ".".join(name.split(".")[:-2])


def adapted_layers(linear: Sequence[str], settings: Lora) -> list[str]:
    """Return the linear layers of a student that get an adapter.

    Args:
        linear: full names of all its linear layers.

    Raises:
        ConfigError: a target names no layer of the chosen parts.
    """
    there = [name for name in linear if name != "lm_head" and part_of(name + ".") in settings.parts]
    chosen = [name for name in there if not settings.targets or name.rpartition(".")[2] in settings.targets]
    if unknown := set(settings.targets) - {name.rpartition(".")[2] for name in chosen}:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in there}))
        raise ConfigError(
            f"train.lora.targets: no linear layer {sorted(unknown)[0]!r} in {', '.join(settings.parts)}; "
            f"there is {known}"
        )
    return chosen
