"""The batch of a skipped update on disk: `batch.json`, with its tensors and images in `batch.safetensors`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmopd.errors import UserError
from mmopd.records import Encoded
from mmopd.train.prefix_tree import Item

TEXT = "batch.json"
TENSORS = "batch.safetensors"
TENSOR = "$tensor"  # key of a value that is in the other file
BYTES = "$bytes"
ENCODED = TypeAdapter(Encoded)


def write_batch(folder: Path, items: Sequence[Item], **about: str | int) -> None:
    """Write the inputs of an update; a prompt that several responses share is written once."""
    tensors: dict[str, Tensor] = {}
    prompts = {id(item.encoded): item.encoded for item in items}
    number = {one: i for i, one in enumerate(prompts)}
    rows = [
        {f.name: _plain(getattr(item, f.name), tensors) for f in fields(item) if f.name != "encoded"} for item in items
    ]
    batch = [row | {"encoded": number[id(item.encoded)]} for row, item in zip(rows, items, strict=True)]
    text = {**about, "prompts": [_plain(encoded, tensors) for encoded in prompts.values()], "items": batch}
    (folder / TEXT).write_text(json.dumps(text, ensure_ascii=False), encoding="utf-8")
    save_file(tensors, folder / TENSORS)


def read_batch(folder: Path) -> tuple[list[Item], dict[str, Any]]:
    """Return the items and the notes that `write_batch` wrote.

    Raises:
        UserError: there is no batch, or an incomplete one.
    """
    try:
        text = json.loads((folder / TEXT).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot read a skipped update from this folder: {error}") from error
    prompts = [ENCODED.validate_python(_whole(prompt, tensors)) for prompt in text.pop("prompts")]
    items = []
    for row in text.pop("items"):
        values = {
            name: tuple(value) if isinstance(value, list) else value for name, value in _whole(row, tensors).items()
        }
        items.append(Item(**values | {"encoded": prompts[row["encoded"]]}))
    return items, text


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON has it; tensors and bytes go to `tensors`."""
    if isinstance(value, (Tensor, bytes)):
        key = str(len(tensors))
        tensors[key] = (
            value.detach().cpu().clone()
            if isinstance(value, Tensor)
            else torch.frombuffer(bytearray(value), dtype=torch.uint8)
        )
        return {TENSOR if isinstance(value, Tensor) else BYTES: key}
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), tensors) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(one, tensors) for key, one in value.items()}
    return [_plain(one, tensors) for one in value] if isinstance(value, (tuple, list)) else value


def _whole(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Reverse `_plain`, with a list for each tuple."""
    if isinstance(value, dict):
        if value.keys() == {TENSOR}:
            return tensors[value[TENSOR]]
        if value.keys() == {BYTES}:
            return tensors[value[BYTES]].numpy().tobytes()
        return {key: _whole(one, tensors) for key, one in value.items()}
    return [_whole(one, tensors) for one in value] if isinstance(value, list) else value
