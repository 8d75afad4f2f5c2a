"""Hashes of files, which decide whether an earlier result can be used again."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

# Files that can change a model's answers.
MODEL_FILES = frozenset({".safetensors", ".bin", ".json", ".jinja", ".txt", ".model"})


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
