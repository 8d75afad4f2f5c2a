"""Check that adapters fit the model that they go on top of, before a server loads them.

vLLM takes an adapter whose modules its model does not have, applies nothing, and says nothing. Names and shapes of the
model come from the headers of its weights.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path

from mmopd.errors import CheckpointError
from mmopd.model_folder import check_finite, read_shapes
from mmopd.serving.lora import PREFIX, WEIGHTS, Adapter

EMBEDDINGS = ("embed_tokens", "pos_embed", "lm_head")  # matrices that are no linear layers
PACKED = (".weight", ".qweight", ".weight_packed")  # names of a linear layer's matrix, also if it is quantised
# Prefixes that vLLM 0.32 renames in a class (`hf_to_vllm_mapper`), for weights and adapters alike. Other classes keep
# their names.
VL = {"model.language_model.": "language_model.model.", "model.visual.": "visual."}
RENAMED: Mapping[str, Mapping[str, str]] = {
    "Qwen3VLForConditionalGeneration": VL,
    "Qwen3VLMoeForConditionalGeneration": VL,
    "Qwen3_5ForConditionalGeneration": VL,
    "Qwen3_5MoeForConditionalGeneration": VL,
    "Qwen2VLForConditionalGeneration": VL | {"model.": "language_model.model."},
    "Qwen2_5_VLForConditionalGeneration": VL | {"model.": "language_model.model."},
    "Qwen3_5ForCausalLM": {"model.language_model.": "model."},
    "Qwen3_5MoeForCausalLM": {"model.language_model.": "model."},
}


def check_adapters(adapters: Mapping[str, Adapter], model: Path, *, cpu: bool) -> None:
    """Check that each module of each adapter is a linear layer of a model, and of its shape.

    Args:
        adapters: adapters by the names of their endpoints.
        model: folder of the model that the server loads them on top of.
        cpu: true if the server runs without a GPU.

    Raises:
        CheckpointError: one does not fit; the message has one of its names, and what the model calls that layer.
    """
    layers = _linear_layers(model)
    if cpu and any(".experts." in name for name in layers):
        first = next(iter(adapters.values()))
        raise CheckpointError(
            f"{first.path}: vLLM serves no adapter on a mixture of experts ({model}) without a GPU: its engine would "
            "end at the first request; merge the adapter into its model (peft: merge_and_unload), or use a GPU"
        )
    renamed = RENAMED.get(_architecture(model), {})
    called = {_as_vllm(name, renamed): name for name in layers}
    for adapter in adapters.values():
        check_finite(adapter.path / WEIGHTS)
        unknown = [name for name in adapter.layers if _as_vllm(name, renamed) not in called or ".experts." in name]
        if unknown:
            raise CheckpointError(_unknown(adapter, unknown, model, called))
        for name, shape in adapter.layers.items():
            own = layers[called[_as_vllm(name, renamed)]]
            if own and own != shape:
                raise CheckpointError(
                    f"{adapter.path / WEIGHTS}: {PREFIX + name!r} is for a layer of [out, in] = {list(shape)}, and "
                    f"{called[_as_vllm(name, renamed)]!r} of {model} has {list(own)}: it was trained on another model"
                )


def _unknown(adapter: Adapter, unknown: list[str], model: Path, called: Mapping[str, str]) -> str:
    name = unknown[0]
    said = (
        f"{adapter.path / WEIGHTS}: {PREFIX + name!r} is no linear layer of {model}, and vLLM would ignore it without "
        f"a warning ({len(unknown)} of {len(adapter.layers)} modules are like that)"
    )
    if ".experts." in name:
        return f"{said}: mmopd serves no adapters of experts; merge it into its model (peft: merge_and_unload)"
    _, block, rest = name.partition("layers." if ".layers." in name else "blocks.")
    same = [layer for layer in called.values() if block and layer.endswith("." + block + rest)]
    if same:
        return (
            f"{said}. The model calls it {same[0]!r}: rename the tensors "
            "(docs/teachers.md#an-adapter-with-other-names), or train the adapter on the class that is served"
        )
    near = next(iter(difflib.get_close_matches(name, called.values(), n=1, cutoff=0)), "none")
    return f"{said}. The model's nearest is {near!r}: was the adapter trained on another model?"


def _as_vllm(name: str, renamed: Mapping[str, str]) -> str:
    """Return the name that vLLM gives to a module of a checkpoint or of an adapter."""
    for old, new in renamed.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _linear_layers(model: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape [out, in] of each linear layer by its name in the checkpoint; () if it is quantised."""
    found: dict[str, tuple[int, ...]] = {}
    for key, shape in read_shapes(model).items():
        name, _, last = key.rpartition(".")
        if f".{last}" in PACKED and len(shape) in {0, 2} and name.rpartition(".")[2] not in EMBEDDINGS:
            found[name] = shape
        elif ".experts." in key:  # fused: not linear layers, but they tell what the model is
            found[key] = ()
    return found


def _architecture(model: Path) -> str:
    """Return the class that the model's config.json names; "" if it names none."""
    try:
        return str(json.loads((model / "config.json").read_text(encoding="utf-8"))["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
