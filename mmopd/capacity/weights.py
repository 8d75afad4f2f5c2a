"""Check the weights of a model folder by the headers of its files, before a process starts."""

from collections.abc import Mapping
from pathlib import Path

from mmopd.capacity import shapes
from mmopd.capacity.model_size import MAX_BYTES
from mmopd.errors import CheckpointError
from mmopd.model_folder import read_object, read_shapes, refuse_code

PREFIXES = frozenset({"model", "language_model"})  # parts of names that differ between published checkpoints


def check_model(folder: Path) -> None:
    """Check that a folder has a model that runs no code of its own, and whose weights fit its configuration.

    Shapes are compared for the architectures that `shapes` knows, unless they are quantised. Transformers and vLLM find
    weights that are missing.

    Raises:
        CheckpointError: the folder cannot be used; the message names the file, the key or tensor, and what to do.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no model in this folder; it needs a config.json and weights in safetensors")
    refuse_code(folder)
    config = read_object(folder / "config.json", MAX_BYTES)
    found = read_shapes(folder)
    kinds = config.get("architectures")
    if not isinstance(kinds, list) or not kinds or not all(isinstance(kind, str) for kind in kinds):
        raise CheckpointError(f"{folder / 'config.json'}: architectures: expected the name of a class; add it")
    if kinds[0] not in shapes.ARCHITECTURES or config.get("quantization_config"):
        return
    try:
        wanted, _, _ = shapes.read(config)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{folder / 'config.json'}: no model can be built from it: {type(error).__name__}: {error}"
        ) from error
    _compare(folder, found, {name: shape.size for name, shape in wanted.items()}, kinds[0])


def _compare(
    folder: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], kind: str
) -> None:
    there = {_plain(name): name for name in found}
    same = {name: there[_plain(name)] for name in wanted if _plain(name) in there}
    if not same:
        first = next(iter(wanted))
        raise CheckpointError(
            f"{folder}: none of its {len(found)} tensors belongs to {kind}, the class in its config.json (such as "
            f"{first!r}): the weights are those of another model; download the folder again"
        )
    for name, own in same.items():
        size = found[own]
        if size and not _fits(size, wanted[name]):
            raise CheckpointError(
                f"{folder}: the tensor {own!r} has the shape {list(size)}, and by config.json it has "
                f"{list(wanted[name])}: configuration and weights are of different models; download both again"
            )


def _fits(size: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Compare shapes; published experts and convolutions may have their dimensions in another order."""
    return size == wanted if len(wanted) <= 2 else sorted(size) == sorted(wanted)


def _plain(name: str) -> str:
    parts = name.split(".")
    while parts[0] in PREFIXES:
        parts.pop(0)
    return ".".join(parts)
