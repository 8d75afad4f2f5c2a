"""LoRA by peft: adapters on the student's linear layers; only they are trained.

Other modules see the weights with adapters merged: engine and export know nothing of LoRA
([docs/decisions/015](../../docs/decisions/015-adapters-reach-the-engine-merged.md)). There is no dropout: with it, the
trained policy would differ from the sampled one. The experts of a mixture are not linear layers and get no adapters.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from mmopd.config import Lora
from mmopd.serving.lora import WEIGHTS
from mmopd.train.families import adapted_layers

NAME = "default"  # peft's for the one adapter of a model
BASE = ".base_layer."  # part of the name of a weight that has an adapter


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight of the student as the checkpoint has it."""

    name: str  # without the parts that peft adds
    # The parameters to gather for it: its own, and with an adapter A [rank, in] and B [out, rank].
    parameters: tuple[Any, ...]
    scale: float = 0.0

    @property
    def trained(self) -> bool:
        """True if an optimiser step may change it."""
        return any(p.requires_grad for p in self.parameters)

    def value(self) -> Tensor:
        """Return the current value with its adapter merged; the sum is computed in float32 and rounded once."""
        own: Tensor = self.parameters[0].data
        if len(self.parameters) == 1:
            return own
        a, b = (p.data.float() for p in self.parameters[1:])
        merged: Tensor = own.float() + self.scale * (b @ a)
        return merged.to(own.dtype)


def add_adapters(student: Any, settings: Lora) -> None:
    """Add an adapter to each linear layer that the settings select, and freeze everything else; outputs do not change.

    Raises:
        ConfigError: no layer is selected.
    """
    linear = [name for name, module in student.named_modules() if isinstance(module, nn.Linear)]
    chosen = adapted_layers(linear, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same adapters on every rank
        inject_adapter_in_model(_config(settings, chosen), student)


def weights(student: Any) -> Iterator[Weight]:
    """Return the weights of a student under their names without adapters; a tied head is left out."""
    for name, p in student.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        path, adapted, _ = name.partition(BASE)
        if adapted and name.endswith(".weight"):
            layer: LoraLayer = student.get_submodule(path)
            yield Weight(
                f"{path}.weight", (p, layer.lora_A[NAME].weight, layer.lora_B[NAME].weight), layer.scaling[NAME]
            )
        else:
            yield Weight(name.replace(BASE, "."), (p,))


def save_adapter(student: Any, settings: Lora, base: Path, folder: Path, *, write: bool) -> None:
    """Write the adapters as a peft folder; collective, with `write` true on one rank."""
    import deepspeed

    layers = [(name, module) for name, module in student.named_modules() if isinstance(module, LoraLayer)]
    state: dict[str, Tensor] = {}
    for name, layer in layers:
        pair: dict[str, Any] = {"lora_A": layer.lora_A[NAME].weight, "lora_B": layer.lora_B[NAME].weight}
        with deepspeed.zero.GatheredParameters(list(pair.values())):
            if write:
                state |= {
                    f"base_model.model.{name}.{key}.weight": p.detach().to("cpu", copy=True) for key, p in pair.items()
                }
    if write:
        config = _config(settings, [name for name, _ in layers])
        config.base_model_name_or_path = str(base)
        config.inference_mode = True
        config.save_pretrained(str(folder))
        save_file(state, folder / WEIGHTS)


def _config(settings: Lora, layers: list[str]) -> LoraConfig:
    return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=layers)  # type: ignore[arg-type]
