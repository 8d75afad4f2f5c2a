"""Shared by the tests of scoring: prompts and an encoder of the demo world, without a model, and the sum of counts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmopd.demo.world import build_processor
from mmopd.modality import Encoder
from mmopd.records import Prompt


def prompt(row: dict[str, Any], modality: str, key: str = "p/0", **extra: str) -> Prompt:
    """Return a row of the demo as a prompt."""
    messages, images = tuple(row["messages"]), tuple(row["images"])
    return Prompt(key, f"{modality}_task", modality, messages, images, row["answer"], extra)


def processor_encoder(folder: Path) -> Encoder:
    """Write the processor of the demo's student to the folder, and return an encoder with it."""
    build_processor().save_pretrained(folder)
    return Encoder(folder)


def balances(counts: Mapping[str, int], n: int) -> bool:
    """Return whether the counts of a scorer account for each of n calls and for each request."""
    absent = sum(v for k, v in counts.items() if k.startswith("absent/"))
    failed = sum(v for k, v in counts.items() if k.startswith("failed/"))
    sent = counts["requests"] - failed - counts["cancelled"]
    return counts["asked"] == n == counts["scored"] + absent and sent == counts["answers"] - counts["reused"]
