"""Size of a model, from its config.json alone.

Known architectures (`shapes`) are computed by arithmetic. Others are built on torch's meta device, where weights have
shapes but no memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmopd.capacity import shapes
from mmopd.config import Train
from mmopd.errors import CheckpointError, UserError
from mmopd.model_folder import load_config, refuse_code
from mmopd.train.families import adapted_layers, part_of, unit

MAX_BYTES = 1 << 20  # largest accepted config.json


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of a model, by its full name; a tied head is the embedding and counts once."""

    name: str
    parameters: int
    trained: bool


@dataclass(frozen=True, slots=True)
class Text:
    """Facts about a language model for the estimates."""

    hidden: int
    layers: int
    caching: int  # layers with a KV cache; the others have linear attention
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int  # width that a token passes through: all its experts together
    vocabulary: int

    @property
    def query(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_size


@dataclass(frozen=True, slots=True)
class Vision:
    """Facts about a vision tower for the estimates."""

    hidden: int
    depth: int
    intermediate: int
    merge: int  # patches of a visual token: the square of the merge size
    levels: int  # sets of visual tokens that it produces: the last one, and those of deepstack


@dataclass(frozen=True, slots=True)
class Model:
    """Shapes of a model, without its values."""

    folder: Path
    weights: tuple[Weight, ...]
    text: Text
    vision: Vision | None
    active_experts: float  # share of the experts' weights that a token uses; 1 without experts

    @property
    def parameters(self) -> int:
        """Parameters of all weights."""
        return sum(weight.parameters for weight in self.weights)

    @property
    def sent(self) -> int:
        """Parameters that the engine gets after an update, as `Trainer.named_weights` chooses them, with adapters
        merged.
        """
        own = {weight.name: weight.parameters for weight in self.weights if ".lora_" not in weight.name}
        units = {unit(_without_adapter(weight.name)) for weight in self.weights if weight.trained}
        return sum(n for name, n in own.items() if unit(_without_adapter(name)) in units)

    @property
    def tower(self) -> int:
        """Parameters of the vision tower and its projector."""
        return sum(weight.parameters for weight in self.weights if ".visual." in f".{weight.name}")

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding if it is not the head too: they are looked up, not multiplied."""
        tied = not any(weight.name == "lm_head.weight" for weight in self.weights)
        return 0 if tied else self.text.vocabulary * self.text.hidden

    @property
    def read(self) -> int:
        """Parameters of the language model that a decoding step reads, if its sequences use all experts."""
        return self.parameters - self.tower - self.embedding

    @property
    def active(self) -> float:
        """Parameters of the language model that a token is multiplied with."""
        experts = sum(weight.parameters for weight in self.weights if ".experts." in weight.name)
        return self.read - experts * (1 - self.active_experts)


def read_model(folder: Path, train: Train | None = None) -> Model:
    """Return a model from the config.json in its folder.

    Args:
        folder: the folder.
        train: `train` of the recipe, for a student: its frozen parts and adapters.

    Raises:
        CheckpointError: there is no config.json, no model can be built from it, or it names code to run.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: there is no config.json, the only file that an estimate needs; download it: "
            f"hf download OWNER/{folder.name} config.json --local-dir {folder}"
        )
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes are too many for the configuration of a model")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError(f"expected keys and values, found {type(config).__name__}")
        refuse_code(folder)
        known = (config.get("architectures") or ["none"])[0] in shapes.ARCHITECTURES
        return _compute(folder, config, train) if known else build(folder, train)
    except UserError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: no model can be built from it: {type(error).__name__}: {error}") from error


def _compute(folder: Path, config: dict[str, Any], train: Train | None) -> Model:
    """Return a model of a known architecture."""
    found, text, vision = shapes.read(config)
    return Model(folder, tuple(_marked(found, train)), _text(text), _vision(vision), _share(text))


def _marked(found: dict[str, shapes.Shape], train: Train | None) -> Iterator[Weight]:
    """Yield the weights, frozen as in the trainer, with the trainer's adapters and the names that peft gives."""
    lora = train.lora if train else None
    linear = [name.removesuffix(".weight") for name, shape in found.items() if shape.linear]
    adapted = set(adapted_layers(linear, lora)) if lora else set()
    for name, shape in found.items():
        layer, _, kind = name.rpartition(".")
        if lora is None:
            yield Weight(name, shape.parameters, train is None or part_of(name) not in train.freeze)
        elif layer not in adapted:
            yield Weight(name, shape.parameters, False)
        else:
            yield Weight(f"{layer}.base_layer.{kind}", shape.parameters, False)
            if kind == "weight":
                out, into = shape.size
                yield Weight(f"{layer}.lora_A.default.weight", lora.rank * into, True)
                yield Weight(f"{layer}.lora_B.default.weight", out * lora.rank, True)


def build(folder: Path, train: Train | None = None) -> Model:
    """Build a model of any architecture that transformers knows on torch's meta device; imports both packages."""
    import torch
    import transformers

    config = load_config(folder)
    kind = getattr(transformers, (config.architectures or ["none"])[0])
    with torch.device("meta"):
        built = kind(config)
        _mark(built, train)
    weights = tuple(Weight(name, p.numel(), p.requires_grad) for name, p in built.named_parameters())
    text = config.get_text_config()
    return Model(folder, weights, _text(text), _vision(getattr(config, "vision_config", None)), _share(text))


def _mark(built: Any, train: Train | None) -> None:
    """Freeze the parts that the trainer freezes, and add its adapters."""
    if train is None:
        return
    from mmopd.train.students import freeze

    freeze(built, train.freeze)
    if train.lora is not None:
        from mmopd.train.lora import add_adapters

        add_adapters(built, train.lora)


def _share(text: Any) -> float:
    """Return the share of the experts that a token uses; 1 without experts."""
    experts = getattr(text, "num_experts", None)
    return float(text.num_experts_per_tok / experts) if experts else 1.0


def _without_adapter(name: str) -> str:
    """Return `q_proj.weight` for peft's `q_proj.base_layer.weight` and `q_proj.lora_A.default.weight`."""
    layer, adapter, _ = name.partition(".lora_")
    return f"{layer}.weight" if adapter else name.replace(".base_layer.", ".")


def _text(config: Any) -> Text:
    layers = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or []
    experts = getattr(config, "num_experts", None)
    passed = config.num_experts_per_tok * config.moe_intermediate_size if experts else config.intermediate_size
    return Text(
        hidden=config.hidden_size,
        layers=layers,
        caching=layers - kinds.count("linear_attention"),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate=passed + (getattr(config, "shared_expert_intermediate_size", 0) or 0),
        vocabulary=config.vocab_size,
    )


def _vision(config: Any) -> Vision | None:
    if config is None:
        return None
    levels = 1 + len(getattr(config, "deepstack_visual_indexes", None) or [])
    return Vision(config.hidden_size, config.depth, config.intermediate_size, config.spatial_merge_size**2, levels)
