"""Files of checkpoints, read without a trainer. Each has a manifest with the size and SHA-256 of its files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmopd.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "state.json"
Manifest = Mapping[str, tuple[int, str]]  # file -> bytes, SHA-256


def finished(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest last; some may lack files."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def whole(folder: Path) -> Iterator[Path]:
    """Return the checkpoints in a folder whose files are all there in full size, newest first."""
    return (path for path in reversed(finished(folder)) if not problem(path))


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        manifest = {str(name): (int(size), str(sha256)) for name, (size, sha256) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path / MANIFEST}: missing or unreadable, so this checkpoint is incomplete") from None
    if STATE not in manifest:
        raise CheckpointError(f"{path / MANIFEST}: names no {STATE}, so this checkpoint is incomplete")
    return manifest


def read_state(path: Path) -> dict[str, Any]:
    """Return the state of a checkpoint: step, ranks, score, record of the teachers, and the caller's state.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        found = json.loads((path / STATE).read_text(encoding="utf-8"))
        step, ranks, caller = found["step"], found["ranks"], found["caller"]
        if isinstance(step, int) and isinstance(ranks, int) and isinstance(caller, dict):
            return {"score": None, "teachers": None, **found}
        problem = "it does not have a number of steps, a number of ranks and a state"
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise CheckpointError(
        f"{path / STATE}: damaged ({problem}); remove {path} to go on from the checkpoint before it"
    ) from None


def problem(path: Path) -> str:
    """Return what is visibly wrong with a checkpoint: no manifest, or a file that is missing or has another size."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return str(error)
    for name, (size, _) in manifest.items():
        file = path / name
        if not file.is_file():
            return f"{file}: missing from the checkpoint"
        if file.stat().st_size != size:
            return f"{file}: {file.stat().st_size} bytes, saved with {size}"
    return ""
