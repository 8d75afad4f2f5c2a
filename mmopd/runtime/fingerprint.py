"""Hashes of files, which decide whether an earlier result can be used again, and whether a model is still the same."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmopd.errors import CheckpointError
from mmopd.model_folder import header

# Files that can change a model's answers.
MODEL_FILES = frozenset({".safetensors", ".bin", ".json", ".jinja", ".txt", ".model"})
CONFIGS = frozenset({"config.json", "adapter_config.json", "generation_config.json"})
END = 4096  # bytes that are read at each end of a tensor


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identifies a served model.

    `weights` is a hash of the files, or all that a server says that nobody has a hash of: the name and path of its
    model. Then the other fields are empty.
    """

    weights: str = ""
    adapter: str = ""  # empty: none
    tokenizer: str = ""

    @property
    def hashed(self) -> bool:
        """True if it was made from the files."""
        return bool(self.tokenizer)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """Return 16 hex digits over the names and bytes of files, in this order."""
    return hashlib.sha256("\n".join(f"{path.name} {hash_file(path)}" for path in paths).encode()).hexdigest()[:16]


def hash_model(folder: Path) -> str:
    """Return `hash_files` of everything in a model folder that can change an answer."""
    return hash_files(sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES))


def sample_weights(folder: Path) -> str:
    """Return 16 hex digits over the configuration of a model or adapter, and over both ends of each of its tensors.

    It reads a few MB of a model of any size. Training changes nearly every value, so that it changes this hash.

    Raises:
        CheckpointError: a file of weights cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        parts = _ends(path) if path.suffix == ".safetensors" else [path.read_bytes()] if path.name in CONFIGS else []
        for part in parts:
            digest.update(f"{path.name} {len(part)} ".encode() + part)
    return digest.hexdigest()[:16]


def _ends(path: Path) -> Iterator[bytes]:
    """Yield the header of a safetensors file, then the first and the last bytes of each tensor."""
    header(path)  # refuses a file that is damaged or cut
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length)
            yield text
            for name, tensor in sorted(json.loads(text).items()):
                if name != "__metadata__":
                    begin, end = (8 + length + offset for offset in tensor["data_offsets"])
                    for at in (begin, max(begin, end - END)):
                        file.seek(at)
                        yield file.read(min(END, end - at))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
