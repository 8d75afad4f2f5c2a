"""The arithmetic of `mmopd plan` gives the parameters that transformers makes: names, sizes, and which train."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from published import PUBLISHED, STRONG, write_config
from student_worker import FAMILIES, SEEING

from mmopd.capacity import shapes
from mmopd.capacity.model_size import build, read_model
from mmopd.config import Lora, Train
from mmopd.errors import UserError

TRAINS = {
    "everything": None,
    "without the tower": Train(freeze=("vision",)),
    "the tower alone": Train(freeze=("projector", "language")),
    "adapters": Train(lora=Lora(rank=4)),
    "adapters everywhere": Train(lora=Lora(rank=3, parts=("vision", "projector", "language"))),
}
TEXT = FAMILIES["qwen3_vl"][0] | {"num_hidden_layers": 3}
# Shapes of published models, with few layers: more of the same layers cost time and prove nothing more.
WIDE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl_moe": (
        {
            "hidden_size": 2048,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_attention_heads": 32,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "mlp_only_layers": [1],
            "decoder_sparse_step": 2,
        },
        {"depth": 2, "out_hidden_size": 2048, "deepstack_visual_indexes": [0, 1]},
    ),
    "qwen2_5_vl": (
        {
            "hidden_size": 3584,
            "num_hidden_layers": 2,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "intermediate_size": 18944,
        },
        {"depth": 2, "hidden_size": 1280, "out_hidden_size": 3584},
    ),
    "qwen3_5": ({"num_hidden_layers": 5, "attention_bias": True}, {"depth": 2, "out_hidden_size": 4096}),
    "qwen3_5_moe": ({"num_hidden_layers": 5}, {"depth": 1, "out_hidden_size": 2048, "in_channels": 1}),
}


def save(folder: Path, kind: str, text: dict[str, Any], vision: dict[str, Any], tied: bool) -> Path:
    """Write a config.json as transformers writes it."""
    more = {"num_hidden_layers": len(text.get("layer_types", "ab")), **text}
    config = transformers.AutoConfig.for_model(kind, text_config=more, vision_config=vision, tie_word_embeddings=tied)
    config.architectures = [transformers.AutoModelForImageTextToText._model_mapping[type(config)].__name__]
    config.save_pretrained(folder)
    return folder


def assert_same(folder: Path) -> None:
    for train in TRAINS.values():
        found, real = read_model(folder, train), build(folder, train)
        assert sorted(found.weights, key=str) == sorted(real.weights, key=str)
        assert (found.text, found.vision, found.active_experts) == (real.text, real.vision, real.active_experts)
        assert (found.sent, found.embedding, found.tower) == (real.sent, real.embedding, real.tower)


@pytest.mark.parametrize("kind", SEEING)
@pytest.mark.parametrize("tied", [True, False])
def test_a_tiny_student_of_each_family_has_the_parameters_of_transformers(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    assert_same(save(tmp_path / "m", kind, *FAMILIES[kind], tied))


@pytest.mark.parametrize("kind", WIDE)
def test_published_shapes_have_the_parameters_of_transformers(kind: str, tmp_path: Path) -> None:
    assert_same(save(tmp_path / "m", kind, *WIDE[kind], False))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_have_the_parameters_of_transformers(name: str, tmp_path: Path) -> None:
    assert_same(write_config(tmp_path / name, name))


@pytest.mark.parametrize("kind", shapes.ARCHITECTURES)
def test_what_a_config_leaves_out_has_the_default_of_transformers(kind: str, tmp_path: Path) -> None:
    whole = getattr(transformers, kind).config_class().to_dict()
    few = {"num_hidden_layers": 2}
    kept: dict[str, Any] = {"architectures": [kind], "model_type": whole["model_type"]}
    kept |= {"text_config": few, "vision_config": {"depth": 1}} if "vision_config" in whole else few
    (tmp_path / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    found, real = read_model(tmp_path), build(tmp_path)
    assert sorted(found.weights, key=str) == sorted(real.weights, key=str)
    assert (found.text, found.vision, found.active_experts) == (real.text, real.vision, real.active_experts)


def test_a_flat_configuration_of_qwen2_5_vl_is_read(tmp_path: Path) -> None:
    text, vision = FAMILIES["qwen2_5_vl"]
    flat = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vision_config": vision,
    }
    (tmp_path / "config.json").write_text(
        json.dumps(flat | text | {"num_hidden_layers": 2, "vocab_size": 300}), encoding="utf-8"
    )
    assert_same(tmp_path)


def test_text_teachers_and_other_architectures_are_counted_too(tmp_path: Path) -> None:
    few = {"num_hidden_layers": 3}
    for kind, settings in (
        ("Qwen3MoeForCausalLM", STRONG | few | {"mlp_only_layers": [0]}),
        ("Qwen3ForCausalLM", {"model_type": "qwen3", "tie_word_embeddings": True} | TEXT),
        ("Qwen2ForCausalLM", {"model_type": "qwen2"} | TEXT),
    ):
        (tmp_path / "config.json").write_text(json.dumps(settings | {"architectures": [kind]}), encoding="utf-8")
        found, real = read_model(tmp_path), build(tmp_path)
        assert sorted(found.weights, key=str) == sorted(real.weights, key=str)
        assert (found.text, found.vision) == (real.text, real.vision)


@pytest.mark.parametrize("text", ["[1]", "{", '{"architectures": ["Qwen3ForCausalLM"], "hidden_size": "wide"}'])
def test_a_configuration_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json: no model can be built from it"):
        read_model(tmp_path)
