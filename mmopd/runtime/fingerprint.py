"""Hashes of files: what decides whether something that was made before can be used again."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

MODEL_FILES = frozenset(
    {".safetensors", ".bin", ".json", ".jinja", ".txt", ".model"}
)  # what can change a model's answers


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """16 hex digits over the names and bytes of files, in this order."""
    return hashlib.sha256("\n".join(f"{path.name} {hash_file(path)}" for path in paths).encode()).hexdigest()[:16]


def hash_model(folder: Path) -> str:
    """`hash_files` of everything in a model's folder that can change an answer."""
    return hash_files(sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES))
