"""Configurations of published models, and plans of the shipped recipes, for tests of `mmopd plan`."""

import json
from pathlib import Path
from typing import Any

from mmopd import catalog
from mmopd.capacity.budget import Machines, budget
from mmopd.capacity.memory import GPUS

TEXT_RECIPES = ["single_teacher_text", "multi_teacher_text", "strong_to_weak_text"]
RECIPES = ["cross_modal_4b", "multi_teacher_2b", "multi_teacher_4b", *TEXT_RECIPES]
H100 = GPUS["H100-80G"]
VISION = {
    "hidden_size": 1024,
    "depth": 24,
    "intermediate_size": 4096,
    "out_hidden_size": 2560,
    "deepstack_visual_indexes": [5, 11, 17],
}
PUBLISHED: dict[
    str, tuple[float, dict[str, Any], dict[str, Any], bool]
] = {  # 10^9 parameters, text, vision, tied; from the model cards
    "Qwen3-VL-2B-Instruct": (
        2.13,
        {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
        VISION | {"out_hidden_size": 2048},
        True,
    ),
    "Qwen3-VL-4B-Instruct": (
        4.44,
        {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
        VISION,
        True,
    ),
    "Qwen3-VL-8B-Instruct": (
        8.77,
        {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288},
        {
            "hidden_size": 1152,
            "depth": 27,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        False,
    ),
}
SMALL: dict[str, Any] = {  # Qwen3-4B
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
STRONG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def write_config(folder: Path, name: str) -> Path:
    """Write only the config.json of a published model."""
    _, text, vision, tied = PUBLISHED[name]
    text = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": tied} | text
    vision = {
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
    } | vision
    folder.mkdir(parents=True)
    whole = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
    }
    (folder / "config.json").write_text(
        json.dumps(whole | {"text_config": text, "vision_config": vision}), encoding="utf-8"
    )
    return folder


def write_models(folder: Path) -> Path:
    """Write the configurations that the shipped recipes name, without weights."""
    for name in ("Qwen3-VL-2B-Instruct", "Qwen3-VL-4B-Instruct"):
        write_config(folder / "models" / name, name)
    for domain in ("Code", "Math", "Logic", "Document"):
        write_config(folder / f"models/Qwen3-VL-4B-Instruct-{domain}-RL", "Qwen3-VL-4B-Instruct")
    small = ("Qwen3-4B", "Qwen3-4B-Math-RL", "Qwen3-4B-Code-RL")
    for name, config in {"Qwen3-30B-A3B-Instruct-2507": STRONG, **dict.fromkeys(small, SMALL)}.items():
        (folder / "models" / name).mkdir()
        (folder / "models" / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def plan(name: str, *overrides: str, machines: Machines | None = None, **more: Any) -> Any:
    return budget(catalog.load_recipe(f"recipes/{name}.yaml", overrides=overrides), machines or Machines(H100), **more)
