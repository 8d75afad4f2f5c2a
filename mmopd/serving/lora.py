"""LoRA adapters (peft folders) that vLLM serves on top of a model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mmopd.errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20
NOT_SERVED = (
    ".patch_embed.",
    ".embed_tokens.",
    ".lm_head.",
)  # the first was measured: vLLM leaves it out without a word
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM 0.32 makes room for


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA folder, and what a server must know of it beforehand."""

    path: Path
    rank: int  # the largest of its modules
    modules: frozenset[str]  # that it changes, as vLLM is told of them
    vision: bool  # whether the vision part is among them


def read_adapter(path: Path) -> Adapter:
    """Look into a LoRA folder.

    Raises:
        UserError: no adapter in it that vLLM can serve; names the file.
    """
    config = path / CONFIG
    weights = path / WEIGHTS
    for file in (config, weights):
        if not file.is_file():
            raise CheckpointError(f"{path}: no LoRA adapter in this folder: there is no {file.name}")
    if config.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{config}: {config.stat().st_size:,} bytes are no adapter's configuration")
    try:
        settings = json.loads(config.read_text())
        kind = settings["peft_type"]
        rank = max(settings["r"], *(settings.get("rank_pattern") or {}).values(), 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{config}: not the configuration of a LoRA adapter ({type(error).__name__}: {error})"
        ) from None
    if kind != "LORA":
        raise CheckpointError(
            f"{config}: peft_type is {kind!r}; vLLM serves LORA alone: merge this adapter into its model"
        )
    if not isinstance(rank, int) or not 0 < rank <= RANKS[-1]:
        raise CheckpointError(
            f"{config}: rank {rank!r}; vLLM serves 1 to {RANKS[-1]}: merge this adapter into its model"
        )
    try:
        with safe_open(weights, "pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{weights}: not a safetensors file ({error})") from None
    left_out = [
        key
        for key in keys
        if not key.endswith((".lora_A.weight", ".lora_B.weight")) or any(part in key for part in NOT_SERVED)
    ]
    if left_out:
        raise CheckpointError(
            f"{weights}: {left_out[0]!r} is nothing that vLLM is known to serve, and it would say nothing: "
            "train the adapter on the linear layers of the blocks alone, or merge it into its model"
        )
    names = {key.removesuffix(".weight").rpartition(".")[0] for key in keys}
    return Adapter(path, rank, frozenset(map(_module, names)), any(".visual." in name for name in names))


def _module(name: str) -> str:
    """By its last part, which stands for packed modules too; `proj` in full, since vLLM cannot adapt the one of the
    patches.
    """
    last = name.rpartition(".")[2]
    return last if last != "proj" else "visual." + name.partition(".visual.")[2]


def lora_flags(adapters: Mapping[str, Adapter]) -> list[str]:
    """vLLM's flags that serve each adapter under its name; all of them fit in one batch."""
    room = min(rank for rank in RANKS if rank >= max(adapter.rank for adapter in adapters.values()))
    flags = ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(room)]
    # Without this flag vLLM leaves the vision part of an adapter out, and says nothing.
    flags += ["--enable-tower-connector-lora"] * any(adapter.vision for adapter in adapters.values())
    # Unless it is told what to adapt, vLLM 0.32 adapts the output layer too, and dies (on CPU) of prompt log-probs of
    # two requests at once.
    flags += ["--lora-target-modules", *sorted(frozenset().union(*(adapter.modules for adapter in adapters.values())))]
    return [*flags, "--lora-modules", *(f"{name}={adapter.path.resolve()}" for name, adapter in adapters.items())]
