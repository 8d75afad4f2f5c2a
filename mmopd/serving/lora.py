"""LoRA adapters (peft folders) that vLLM serves on top of a model."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmopd.errors import CheckpointError
from mmopd.model_folder import header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's, before the name of a module
PAIR = (".lora_A.weight", ".lora_B.weight")
VISION = ("model.visual.", "visual.")
MAX_CONFIG_BYTES = 1 << 20
# vLLM ignores .patch_embed. without a warning (measured).
NOT_SERVED = (".patch_embed.", ".embed_tokens.", ".lm_head.")
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM 0.32 accepts for --max-lora-rank


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA folder and the facts that a server needs before it loads it."""

    path: Path
    rank: int  # largest rank of its modules
    modules: frozenset[str]  # modules that it changes, in the form that vLLM expects
    vision: bool  # true if it changes the vision part
    layers: Mapping[str, tuple[int, int]]  # name of each module without peft's prefix -> (out, in)


def read_adapter(path: Path) -> Adapter:
    """Read the configuration and the parameter names of a LoRA folder.

    Raises:
        CheckpointError: the folder has no adapter that vLLM can serve; the message names the file.
    """
    config = path / CONFIG
    weights = path / WEIGHTS
    for file in (config, weights):
        if not file.is_file():
            raise CheckpointError(f"{path}: not a LoRA adapter: the folder has no {file.name}")
    if config.stat().st_size > MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{config}: {config.stat().st_size:,} bytes are too many for the configuration of an adapter"
        )
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
        rank = max(settings["r"], *(settings.get("rank_pattern") or {}).values(), 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{config}: not the configuration of a LoRA adapter ({type(error).__name__}: {error})"
        ) from None
    if kind != "LORA":
        raise CheckpointError(
            f"{config}: peft_type is {kind!r}; vLLM serves only LORA; merge this adapter into its model"
        )
    if not isinstance(rank, int) or not 0 < rank <= RANKS[-1]:
        raise CheckpointError(
            f"{config}: rank {rank!r}; vLLM serves ranks 1 to {RANKS[-1]}; merge this adapter into its model"
        )
    ranks = {settings["r"], *(settings.get("rank_pattern") or {}).values()}
    layers = _layers(weights, header(weights), ranks)
    vision = any(name.startswith(VISION) for name in layers)
    return Adapter(path, rank, frozenset(map(_module, layers)), vision, layers)


def _layers(weights: Path, shapes: Mapping[str, tuple[int, ...]], ranks: Collection[int]) -> dict[str, tuple[int, int]]:
    """Return the modules of an adapter with the shape (out, in) of the layers that they fit."""
    left_out = [key for key in shapes if not key.endswith(PAIR) or any(part in key for part in NOT_SERVED)]
    if left_out:
        raise CheckpointError(
            f"{weights}: vLLM would ignore {left_out[0]!r} without a warning; "
            "train the adapter only on the linear layers of the blocks, or merge it into its model"
        )
    layers = {}
    for name in {key.removesuffix(".weight").rpartition(".")[0]: None for key in shapes}:
        a, b = (shapes.get(name + part, ()) for part in PAIR)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] not in ranks:
            raise CheckpointError(
                f"{weights}: {name!r} has lora_A {list(a)} and lora_B {list(b)}; it needs [rank, in] and [out, rank], "
                f"with a rank that {CONFIG} names ({', '.join(map(str, sorted(ranks)))}): save the adapter again"
            )
        layers[name.removeprefix(PREFIX)] = (b[0], a[1])
    if not layers:
        raise CheckpointError(f"{weights}: the adapter has no module; save it again")
    return layers


def _module(name: str) -> str:
    """Return the module name for vLLM: the last part, which also selects packed modules.

    Last parts that other modules share (`proj` of the patch embedding, `0` of a list) are returned in full.
    """
    last = name.rpartition(".")[2]
    return name.removeprefix("model.") if last == "proj" or last.isdecimal() else last


def lora_flags(adapters: Mapping[str, Adapter]) -> list[str]:
    """Return vLLM's flags that serve each adapter under its name; one batch may use all of them."""
    room = min(rank for rank in RANKS if rank >= max(adapter.rank for adapter in adapters.values()))
    flags = ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", str(room)]
    # Without this flag vLLM ignores the vision part of an adapter without a warning.
    flags += ["--enable-tower-connector-lora"] * any(adapter.vision for adapter in adapters.values())
    # Without explicit target modules vLLM 0.32 also adapts the output layer, and then crashes (on CPU) when two
    # requests for prompt log-probs run in parallel.
    flags += ["--lora-target-modules", *sorted(frozenset().union(*(adapter.modules for adapter in adapters.values())))]
    return [*flags, "--lora-modules", *(f"{name}={adapter.path.resolve()}" for name, adapter in adapters.items())]
