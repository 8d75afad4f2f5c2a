"""The family of a served model, which decides lmms-eval's prompt, and what its server adds to a request."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from mmopd.config import Engine
from mmopd.config.suite import PromptVariant

# model_type -> name of the family in lmms-eval. `qwen_vl` there is the model of 2023, whose prompts suit none of these.
VARIANTS: Mapping[str, PromptVariant] = {
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
}
FLAG = "--mm-processor-kwargs"
DEFAULTS = ("--generation-config", "--override-generation-config")  # flags that change the server's sampling defaults


@dataclass(frozen=True, slots=True)
class Served:
    """What is known here of a served model; of one that is served elsewhere, nothing."""

    family: str = "unknown"  # model_type of its config.json
    min_pixels: int | None = None  # to which its server enlarges an image; None if it is not known
    max_pixels: int | None = None
    pixels_per_token: int | None = None
    sampling_defaults: str = "unknown"  # for what a client does not say: `neutral`, or the engine's flags

    @classmethod
    def of(cls, folder: Path, engine: Engine) -> Self:
        """Read the folder of a model, and the flags of the engine that change its pixels or its sampling defaults."""
        family = str(_read(folder / "config.json").get("model_type", cls().family))
        # transformers prefers the new file to the old one, if it has images
        images = _read(folder / "processor_config.json").get("image_processor")
        images = images or _read(folder / "preprocessor_config.json")
        flags = _flags(engine)
        defaults = _defaults(engine)
        if flags is None or not images:
            return cls(family, sampling_defaults=defaults)
        low, high = (own or old for own, old in zip(_pixels(flags), _pixels(images), strict=True))
        side = images.get("patch_size", 0) * images.get("merge_size", 0)
        return cls(family, low, high, side**2 or None, defaults)

    @property
    def variant(self) -> PromptVariant:
        """Name of its family in lmms-eval, or `default`."""
        return VARIANTS.get(self.family, "default")


def _pixels(images: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the fewest and the most pixels of an image; the older keys win, as in transformers."""
    size = images.get("size") or {}
    return (
        images.get("min_pixels") or size.get("shortest_edge"),
        images.get("max_pixels") or size.get("longest_edge"),
    )


def _defaults(engine: Engine) -> str:
    """Return the server's sampling defaults: `neutral`, as its servers are started, or the flags that change them."""
    words = [word for argument in engine.extra_args for word in argument.split("=", 1)]
    changed = [
        f"{word} {value}" for word, value in pairwise([*words, ""]) if word.replace("_", "-").startswith(DEFAULTS)
    ]
    return " ".join(changed) or "neutral"


def _flags(engine: Engine) -> dict[str, Any] | None:
    """Return the settings of images in the engine's flags; None if they are not written as one JSON object."""
    words = [word for argument in engine.extra_args for word in argument.split("=", 1)]
    if any(word != FLAG and word.replace("_", "-").startswith(FLAG) for word in words):
        return None  # such as --mm-processor-kwargs.max_pixels
    given = [json.loads(value) for flag, value in pairwise(words) if flag == FLAG]
    return {**given[-1], **given[-1].get("images_kwargs", {})} if given else {}


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
