"""The parameters of the supported architectures by arithmetic: names and shapes as transformers gives them.

Building a model on torch's meta device gives the same, and takes seconds to import. A test compares both for each
architecture. Defaults are those of transformers' configuration classes, since a config.json may leave them out.
"""

import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

Shapes = Iterator[tuple[str, "Shape"]]

VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
}
DEEPSTACK = VISION | {"deepstack_visual_indexes": (8, 16, 24)}
ATTENTION = {"vocab_size": 151936, "attention_bias": False, "head_dim": None}
EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": ()}
QWEN3 = ATTENTION | {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
}
QWEN3_VL_MOE = {
    **ATTENTION,
    **EXPERTS,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 1408,
    "num_experts_per_tok": 4,
    "num_experts": 60,
}
QWEN3_MOE = QWEN3_VL_MOE | {
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
}
QWEN2_5 = ATTENTION | {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
QWEN3_5 = ATTENTION | {
    "vocab_size": 248320,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
    "layer_types": None,
}
QWEN3_5_MOE = QWEN3_5 | {
    **EXPERTS,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_experts_per_tok": 8,
    "num_experts": 256,
}
QWEN2_5_VISION = VISION | {"depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "patch_size": 14}


class Shape(NamedTuple):
    """Shape of a parameter."""

    size: tuple[int, ...]
    linear: bool = False  # true for the weight of a linear layer [out, in], which may get an adapter

    @property
    def parameters(self) -> int:
        """Number of values of the parameter."""
        return math.prod(self.size)


class Architecture(NamedTuple):
    """Defaults of an architecture, from transformers' configuration classes."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any] | None = None  # None: only a language model
    qwen2: bool = False  # attention and vision tower of Qwen2.5-VL; otherwise of Qwen3


ARCHITECTURES = {  # `architectures` of a config.json
    "Qwen3VLForConditionalGeneration": Architecture(QWEN3, DEEPSTACK),
    "Qwen3VLMoeForConditionalGeneration": Architecture(QWEN3_VL_MOE, DEEPSTACK),
    "Qwen2_5_VLForConditionalGeneration": Architecture(QWEN2_5, QWEN2_5_VISION, qwen2=True),
    "Qwen3_5ForConditionalGeneration": Architecture(QWEN3_5, VISION),
    "Qwen3_5MoeForConditionalGeneration": Architecture(QWEN3_5_MOE, VISION),
    "Qwen3ForCausalLM": Architecture(QWEN3),
    "Qwen3MoeForCausalLM": Architecture(QWEN3_MOE),
}


def read(config: Mapping[str, Any]) -> tuple[dict[str, Shape], SimpleNamespace, SimpleNamespace | None]:
    """Compute the parameters of a model.

    Args:
        config: of a config.json whose architecture is one of ARCHITECTURES.

    Returns:
        name -> shape, a tied head left out; and the settings of the language model and of the vision tower, with
        defaults.

    Raises:
        ValueError: a size is no whole number.
    """
    known = ARCHITECTURES[config["architectures"][0]]
    inner = config.get("text_config") if known.vision is not None else None
    text = SimpleNamespace(**{**known.text, **(config if inner is None else inner)})  # older configurations are flat
    _complete(text, known.qwen2)
    vision = None
    prefix = "model"
    found: dict[str, Shape] = {}
    if known.vision is not None:
        vision = SimpleNamespace(**{**known.vision, **(config.get("vision_config") or {})})
        prefix = "model.language_model"
        found.update(_old_tower(vision) if known.qwen2 else _tower(vision))
    found.update(_language(text, prefix, known.qwen2))
    if not config.get("tie_word_embeddings", False):
        found["lm_head.weight"] = Shape((text.vocab_size, text.hidden_size), linear=True)
    for name, shape in found.items():
        if not all(isinstance(side, int) for side in shape.size):
            raise ValueError(f"{name} would have the shape {shape.size}")
    return found, text, vision


def _complete(text: SimpleNamespace, qwen2: bool) -> None:
    """Fill in what transformers derives from other settings."""
    if hasattr(text, "num_local_experts"):  # name that transformers writes
        text.num_experts = text.num_local_experts
    if text.num_key_value_heads is None:
        text.num_key_value_heads = text.num_attention_heads
    if qwen2 or text.head_dim is None:
        text.head_dim = text.hidden_size // text.num_attention_heads
    if getattr(text, "mlp_only_layers", ()) is None:
        text.mlp_only_layers = ()
    interval = getattr(text, "full_attention_interval", None)
    if interval is not None and text.layer_types is None:
        kinds = ("linear_attention", "full_attention")
        text.layer_types = [kinds[(i + 1) % interval == 0] for i in range(text.num_hidden_layers)]


def _linear(name: str, out: int, into: int, *, bias: bool = False) -> Shapes:
    yield f"{name}.weight", Shape((out, into), linear=True)
    if bias:
        yield f"{name}.bias", Shape((out,))


def _norm(name: str, size: int, *, bias: bool = False) -> Shapes:
    yield f"{name}.weight", Shape((size,))
    if bias:
        yield f"{name}.bias", Shape((size,))


def _gated(name: str, hidden: int, inner: int, *, bias: bool = False) -> Shapes:
    yield from _linear(f"{name}.gate_proj", inner, hidden, bias=bias)
    yield from _linear(f"{name}.up_proj", inner, hidden, bias=bias)
    yield from _linear(f"{name}.down_proj", hidden, inner, bias=bias)


def _language(text: SimpleNamespace, prefix: str, qwen2: bool) -> Shapes:
    hidden = text.hidden_size
    kinds = getattr(text, "layer_types", None)
    yield f"{prefix}.embed_tokens.weight", Shape((text.vocab_size, hidden))
    for i in range(text.num_hidden_layers):
        layer = f"{prefix}.layers.{i}"
        if kinds and kinds[i] == "linear_attention":
            yield from _delta_net(f"{layer}.linear_attn", text)
        elif qwen2:
            yield from _attention(f"{layer}.self_attn", text, bias=True, out_bias=False)
        else:
            gate = hasattr(text, "linear_num_value_heads")
            yield from _attention(f"{layer}.self_attn", text, bias=text.attention_bias, norms=True, gate=gate)
        experts = getattr(text, "num_experts", 0)
        if experts and i not in text.mlp_only_layers and (i + 1) % text.decoder_sparse_step == 0:
            yield from _experts(f"{layer}.mlp", text)
        else:
            yield from _gated(f"{layer}.mlp", hidden, text.intermediate_size)
        yield from _norm(f"{layer}.input_layernorm", hidden)
        yield from _norm(f"{layer}.post_attention_layernorm", hidden)
    yield from _norm(f"{prefix}.norm", hidden)


def _attention(
    name: str,
    text: SimpleNamespace,
    *,
    bias: bool,
    out_bias: bool | None = None,
    norms: bool = False,
    gate: bool = False,
) -> Shapes:
    """Yield the parameters of attention; with `gate` the query projection also yields a gate of the same width."""
    hidden = text.hidden_size
    query = text.num_attention_heads * text.head_dim
    key = text.num_key_value_heads * text.head_dim
    yield from _linear(f"{name}.q_proj", query * (1 + gate), hidden, bias=bias)
    yield from _linear(f"{name}.k_proj", key, hidden, bias=bias)
    yield from _linear(f"{name}.v_proj", key, hidden, bias=bias)
    yield from _linear(f"{name}.o_proj", hidden, query, bias=bias if out_bias is None else out_bias)
    if norms:
        yield from _norm(f"{name}.q_norm", text.head_dim)
        yield from _norm(f"{name}.k_norm", text.head_dim)


def _delta_net(name: str, text: SimpleNamespace) -> Shapes:
    """Yield the parameters of a gated delta net."""
    hidden = text.hidden_size
    heads = text.linear_num_value_heads
    key = text.linear_num_key_heads * text.linear_key_head_dim
    value = heads * text.linear_value_head_dim
    mixed = 2 * key + value
    yield f"{name}.dt_bias", Shape((heads,))
    yield f"{name}.A_log", Shape((heads,))
    yield f"{name}.conv1d.weight", Shape((mixed, 1, text.linear_conv_kernel_dim))
    yield from _norm(f"{name}.norm", text.linear_value_head_dim)
    yield from _linear(f"{name}.out_proj", hidden, value)
    yield from _linear(f"{name}.in_proj_qkv", mixed, hidden)
    yield from _linear(f"{name}.in_proj_z", value, hidden)
    yield from _linear(f"{name}.in_proj_b", heads, hidden)
    yield from _linear(f"{name}.in_proj_a", heads, hidden)


def _experts(name: str, text: SimpleNamespace) -> Shapes:
    """Yield the parameters of a mixture of experts, whose weights are fused; the router is not a linear layer."""
    hidden = text.hidden_size
    inner = text.moe_intermediate_size
    number = text.num_experts
    yield f"{name}.gate.weight", Shape((number, hidden))
    yield f"{name}.experts.gate_up_proj", Shape((number, 2 * inner, hidden))
    yield f"{name}.experts.down_proj", Shape((number, hidden, inner))
    if shared := getattr(text, "shared_expert_intermediate_size", None):
        yield from _gated(f"{name}.shared_expert", hidden, shared)
        yield from _linear(f"{name}.shared_expert_gate", 1, hidden)


def _patches(vision: SimpleNamespace) -> Shape:
    """Yield the parameters of the convolution that embeds patches."""
    patch = vision.patch_size
    return Shape((vision.hidden_size, vision.in_channels, vision.temporal_patch_size, patch, patch))


def _tower(vision: SimpleNamespace) -> Shapes:
    """Yield the parameters of the vision tower and the projectors of Qwen3-VL and Qwen3.5."""
    hidden = vision.hidden_size
    yield "model.visual.patch_embed.proj.weight", _patches(vision)
    yield "model.visual.patch_embed.proj.bias", Shape((hidden,))
    yield "model.visual.pos_embed.weight", Shape((vision.num_position_embeddings, hidden))
    for i in range(vision.depth):
        block = f"model.visual.blocks.{i}"
        yield from _norm(f"{block}.norm1", hidden, bias=True)
        yield from _norm(f"{block}.norm2", hidden, bias=True)
        yield from _linear(f"{block}.attn.qkv", 3 * hidden, hidden, bias=True)
        yield from _linear(f"{block}.attn.proj", hidden, hidden, bias=True)
        yield from _linear(f"{block}.mlp.linear_fc1", vision.intermediate_size, hidden, bias=True)
        yield from _linear(f"{block}.mlp.linear_fc2", hidden, vision.intermediate_size, bias=True)
    merged = hidden * vision.spatial_merge_size**2
    levels = len(getattr(vision, "deepstack_visual_indexes", ()))
    deep = [(f"model.visual.deepstack_merger_list.{i}", merged) for i in range(levels)]
    for name, normed in [("model.visual.merger", hidden), *deep]:
        yield from _norm(f"{name}.norm", normed, bias=True)
        yield from _linear(f"{name}.linear_fc1", merged, merged, bias=True)
        yield from _linear(f"{name}.linear_fc2", vision.out_hidden_size, merged, bias=True)


def _old_tower(vision: SimpleNamespace) -> Shapes:
    """Yield the parameters of the vision tower and the projector of Qwen2.5-VL."""
    hidden = vision.hidden_size
    yield "model.visual.patch_embed.proj.weight", _patches(vision)
    for i in range(vision.depth):
        block = f"model.visual.blocks.{i}"
        yield from _norm(f"{block}.norm1", hidden)
        yield from _norm(f"{block}.norm2", hidden)
        yield from _linear(f"{block}.attn.qkv", 3 * hidden, hidden, bias=True)
        yield from _linear(f"{block}.attn.proj", hidden, hidden, bias=True)
        yield from _gated(f"{block}.mlp", hidden, vision.intermediate_size, bias=True)
    merged = hidden * vision.spatial_merge_size**2
    yield from _norm("model.visual.merger.ln_q", hidden)
    yield from _linear("model.visual.merger.mlp.0", merged, merged, bias=True)
    yield from _linear("model.visual.merger.mlp.2", vision.out_hidden_size, merged, bias=True)
