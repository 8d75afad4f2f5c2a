"""Model folders: load what transformers reads from them, and refuse a folder that could run code of its own.

A folder may come from anybody. With `auto_map` in one of its configurations, transformers asks on standard input
whether to run the folder's Python files, and pickles run code while they are read. Nothing here runs either.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmopd.errors import CheckpointError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
CODE = "auto_map"  # key whose value names classes in Python files of the folder, or of another repository
CHECK_VARIABLE = "MMOPD_CHECK_WEIGHTS"  # set for servers that mmopd starts: vLLM refuses weights that are not finite
NOT_FINITE = "has values that are not finite (NaN or infinite); use another model, or download it again"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_CONFIG_BYTES = 16 << 20  # configurations of tokenizers contain their added tokens
MAX_INDEX_BYTES = 64 << 20


def load_config(folder: Path) -> Any:
    """Return transformers' configuration of a folder.

    Raises:
        CheckpointError: it wants to run its own code, or cannot be read.
    """
    import transformers

    return _load(transformers.AutoConfig, folder, "cannot read a model configuration from this folder")


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder.

    Raises:
        CheckpointError: it wants to run its own code, or cannot be read.
    """
    import transformers

    return _load(transformers.AutoTokenizer, folder, "cannot load a tokenizer from this folder")


def load_processor(folder: Path) -> Any:
    """Return the processor of a folder.

    Raises:
        CheckpointError: it wants to run its own code, or cannot be read.
    """
    import transformers

    return _load(transformers.AutoProcessor, folder, "no processor can be loaded from this folder")


def _load(kind: Any, folder: Path, failure: str) -> Any:
    refuse_code(folder)
    try:
        return kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{folder}: {failure}: {error}") from error


def refuse_code(folder: Path) -> None:
    """Check that no configuration in a folder names code or weights elsewhere, and that no file hangs whoever reads it.

    Raises:
        CheckpointError: one does, or is not a JSON object; the message names the file and the key.
    """
    for path in folder.glob("*"):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise CheckpointError(f"{path}: a pipe, a socket or a device, and no file of a model: remove it")
    if (adapter := folder / ADAPTER).is_file() and (folder / "config.json").is_file():
        raise CheckpointError(
            f"{adapter}: an adapter in the folder of a model: transformers would load the weights that its "
            "base_model_name_or_path names instead of this folder's; move the adapter into a folder of its own"
        )
    for path in sorted(folder.glob("*config.json")):
        found = read_object(path, MAX_CONFIG_BYTES)
        if (key := _find(found)) is not None:
            raise CheckpointError(
                f"{path}: {key} names Python code of the model ({_short(found, key)}), and mmopd runs no code of a "
                "model folder; if transformers knows the model without it, remove the key; otherwise use another model"
            )


def _find(found: Mapping[str, Any]) -> str | None:
    """Return the dotted key of the first `auto_map`, at any depth."""
    waiting: list[tuple[str, Any]] = [("", found)]
    while waiting:
        prefix, value = waiting.pop()
        items: Iterable[tuple[Any, Any]] = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for key, inner in items:
            if key == CODE and inner:
                return f"{prefix}{key}"
            waiting.append((f"{prefix}{key}.", inner))
    return None


def _short(found: Any, key: str) -> str:
    for part in key.split("."):
        found = found[int(part) if isinstance(found, list) else part]
    text = json.dumps(found)
    return text if len(text) <= 100 else text[:100] + " ..."


def read_object(path: Path, most: int) -> dict[str, Any]:
    """Return the JSON object in a file of a model folder.

    Args:
        most: largest accepted size in bytes.

    Raises:
        CheckpointError: the file is no JSON object, or is too large.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file")
    if (size := path.stat().st_size) > most:
        raise CheckpointError(f"{path}: {size:,} bytes are too many for this file of a model (at most {most:,})")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({type(error).__name__}: {error}); download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}; download it again")
    return found


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a model, from the headers of its files; () for packed numbers (quantisation).

    Raises:
        CheckpointError: the weights are pickles or missing; a file is damaged; the index names a file outside of the
            folder, a missing file, or a tensor that its file does not have.
    """
    return {name: shape for _, shapes in _files(folder) for name, shape in shapes.items()}


def _files(folder: Path) -> Iterator[tuple[Path, dict[str, tuple[int, ...]]]]:
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(_no_weights(folder))
        yield from ((file, header(file)) for file in files)
        return
    named = read_object(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise CheckpointError(f"{index}: weight_map: expected the file of each tensor; download it again")
    inside: dict[str, list[str]] = {}
    for tensor, name in named.items():
        inside.setdefault(name, []).append(tensor)
    for name, tensors in inside.items():
        if Path(name).name != name or name in {"", ".."}:
            raise CheckpointError(
                f"{index}: weight_map: {tensors[0]!r} is in {name!r}, which is no file name of this folder: do not use "
                "this model; its files should be next to the index"
            )
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{index}: weight_map names {name!r} ({len(tensors)} tensors), and the folder has no such file: "
                "download it"
            )
        shapes = header(folder / name)
        if absent := [tensor for tensor in tensors if tensor not in shapes]:
            raise CheckpointError(
                f"{index}: weight_map says that {absent[0]!r} is in {name!r}, and it is not ({len(absent)} of "
                f"{len(tensors)} tensors): index and files are of different models; download both again"
            )
        yield folder / name, shapes


def _no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if not pickles:
        return f"{folder}: no weights in this folder; it needs a config.json and weights in safetensors"
    return (
        f"{folder / pickles[0]}: the weights are in pickles, which can run code when they are read; mmopd reads only "
        "safetensors: convert the model where you trust it (transformers: from_pretrained, then save_pretrained)"
    )


def header(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a safetensors file from its header; () for packed numbers (quantisation).

    Raises:
        CheckpointError: it is not a safetensors file, or is cut.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  (not a mapping)
            return {key: tuple(one.get_shape()) if "F" in one.get_dtype() else () for key, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a safetensors file, or not whole ({error}); download it again") from None


def is_finite(tensor: "torch.Tensor") -> bool:
    """Return false if a tensor has a NaN or an infinity; one pass without a copy. Packed numbers are always finite."""
    import torch

    if tensor.numel() == 0 or tensor.dtype not in {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())


def check_finite(file: Path) -> None:
    """Check all values of a safetensors file, such as an adapter's.

    Raises:
        CheckpointError: a tensor has a NaN or an infinity; the message names it.
    """
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118  (not a mapping)
            if not is_finite(opened.get_tensor(name)):
                raise CheckpointError(f"{file}: the tensor {name!r} {NOT_FINITE}")
