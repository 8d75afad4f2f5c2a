"""Atomic checkpoints: ZeRO shards, optimiser, schedule, every rank's random state, and the caller's state.

A checkpoint is written under a temporary name with a manifest of sizes and SHA-256 sums, flushed to disk, and then
renamed. A save that was interrupted keeps its temporary name, and the next save removes it. Loading checks every byte.
"""

import copy
import hashlib
import json
import logging
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmopd.errors import CheckpointError
from mmopd.runtime import python
from mmopd.train.checkpoint_files import MANIFEST, STATE, finished, problem, read_manifest, read_state, whole
from mmopd.train.distributed import Ranks
from mmopd.train.trainer import Trainer

logger = logging.getLogger(__name__)

ZERO = "zero"  # DeepSpeed's tag
PARTIAL = ".step-*.partial"  # unfinished saves
TORCH_CANNOT_WRITE = "inline_container.cc"  # part of the RuntimeError that `torch.save` raises instead of an OSError


class Checkpoints:
    """The checkpoints of a run, newest last.

    Args:
        folder: shared by all ranks.
        keep: how many of the newest to keep.
        best: how many of the older ones to keep, those with the best scores.
        teachers: the record of the run's teachers, JSON; each checkpoint has a copy.
    """

    def __init__(self, folder: Path, keep: int, best: int = 0, teachers: Any = None) -> None:
        self.folder = folder
        self.keep = keep
        self.best = best
        self.teachers = teachers

    def save(self, trainer: Trainer, step: int, state: dict[str, Any], score: float | None = None) -> Path:
        """Write everything that step `step + 1` depends on; collective.

        Args:
            state: the caller's state, JSON, the same on all ranks.
            score: ranks the checkpoints, higher is better; one without a score is never among the best.

        Raises:
            CheckpointError: the disk has no room for it; the message says how much it needs. Earlier checkpoints are
                unchanged.
        """
        ranks = trainer.ranks
        final = self.folder / f"step-{step:08d}"
        torn = self.folder / f".{final.name}.partial"
        if ranks.rank == 0:
            # A resumed run may save the same step again.
            for old in (*self.folder.glob(PARTIAL), *self.folder.glob(final.name)):
                shutil.rmtree(old)
            torn.mkdir(parents=True)
        ranks.barrier()
        self._check_room(trainer, torn)
        try:
            about = {"step": step, "ranks": ranks.size, "score": score, "teachers": self.teachers}
            _write(trainer, torn, about | {"caller": state})
            if ranks.rank == 0:
                torn.rename(final)
                _flush(self.folder)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and TORCH_CANNOT_WRITE not in str(error):
                raise
            failed = torn.with_name(f".{final.name}.failed.partial")
            try:
                torn.rename(failed)
            except FileNotFoundError:  # the save of another rank has failed, and that rank says why
                raise error from None
            shutil.rmtree(failed, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} was not written ({error}); the one before it is unchanged: "
                f"{self._room(trainer)}"
            ) from error
        if ranks.rank == 0:
            self._prune()
        ranks.barrier()
        return final

    def _check_room(self, trainer: Trainer, torn: Path) -> None:
        """Raise on all ranks if the disk has less room than a checkpoint is expected to need."""
        if any(trainer.ranks.all_max([shutil.disk_usage(self.folder).free < _needed(trainer)])):
            shutil.rmtree(torn, ignore_errors=True)
            raise CheckpointError(f"no checkpoint was written; the earlier ones are unchanged: {self._room(trainer)}")

    def _room(self, trainer: Trainer) -> str:
        needs, free = (size / 2**30 for size in (_needed(trainer), shutil.disk_usage(self.folder).free))
        return (
            f"{self.folder} has {free:.3g} GiB free, and a checkpoint needs {needs:.3g} GiB "
            f"in addition to the {self.keep} that are kept"
        )

    def latest(self) -> Path | None:
        """Return the newest checkpoint whose files are all there in full size; None if there is none."""
        return next(self.whole(), None)

    def whole(self) -> Iterator[Path]:
        """Return the checkpoints whose files are all there in full size, newest first."""
        return whole(self.folder)

    def _prune(self) -> None:
        old = finished(self.folder)[: -self.keep]
        scores = {path: score for path in old if (score := _score(path)) is not None} if self.best else {}
        best = sorted(scores, key=lambda path: scores[path])[-self.best :]
        for path in set(old) - set(best):
            # A folder that cannot be removed now is incomplete, so it is never loaded; the next save tries again.
            shutil.rmtree(path, ignore_errors=True)


def load(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Restore trainer and random states from `path`, and return the caller's state; collective.

    Raises:
        CheckpointError: a file is missing, truncated or changed (the message names it), or a checkpoint of another
            number of ranks cannot be converted.
    """
    ranks = trainer.ranks
    wrong = problem(path) or _changed(path, ranks)
    ranks.agree(wrong and f"{wrong}; remove {path} to go on from the checkpoint before it")
    state = read_state(path)
    if state["ranks"] == ranks.size:
        trainer.engine.load_checkpoint(str(path), tag=ZERO)
    else:
        _load_resized(trainer, path)
    _set_random_state(torch.load(path / f"random-{ranks.rank % state['ranks']:05d}.pt", weights_only=True))
    caller: dict[str, Any] = state["caller"]
    return caller


def _score(path: Path) -> float | None:
    """Return the score that the checkpoint was saved with, if any; a damaged one has none, and training goes on."""
    if problem(path):
        return None
    try:
        score: float | None = read_state(path)["score"]
    except CheckpointError as error:
        logger.warning("%s", error)
        return None
    return score


def _write(trainer: Trainer, torn: Path, state: dict[str, Any]) -> None:
    """Write all files of a checkpoint, and return once they are on disk; collective."""
    ranks = trainer.ranks
    if ranks.rank == 0:
        (torn / STATE).write_text(json.dumps(state), encoding="utf-8")
    trainer.engine.save_checkpoint(str(torn), tag=ZERO, save_latest=False)
    torch.save(_random_state(), torn / f"random-{ranks.rank:05d}.pt")
    ranks.barrier()
    sums = dict(
        part
        for parts in ranks.gather_objects(_sums(torn, _share(_files(torn), ranks), flush=True))
        for part in parts.items()
    )
    if ranks.rank == 0:
        _write_flushed(torn / MANIFEST, json.dumps(sums, indent=1, sort_keys=True))
        for inner in {torn, *(torn / name for name in sums)}:
            _flush(inner if inner.is_dir() else inner.parent)


def _needed(trainer: Trainer) -> int:
    """Return the bytes of a checkpoint: trained weights and two optimiser moments in float32, the rest unchanged."""
    return sum(p.ds_numel * (12 if p.requires_grad else p.element_size()) for p in trainer.student.parameters())


def _load_resized(trainer: Trainer, path: Path) -> None:
    """Load the checkpoint of another number of ranks through DeepSpeed's universal format, in a temporary copy.

    That format does not hold weights that are not trained; they keep the values of the student's folder.
    """
    engine = trainer.engine
    ranks = trainer.ranks
    universal = path.with_name(f".{path.name}.resized")
    converter = None
    if ranks.rank == 0:
        for left in path.parent.glob(".step-*.resized"):  # left by a conversion that was interrupted
            shutil.rmtree(left, ignore_errors=True)
        universal.mkdir()
        folders = ["--input_folder", str(path / ZERO), "--output_folder", str(universal / ZERO)]
        command = python.command("-m", "deepspeed.checkpoint.ds_to_universal", *folders)
        converter = subprocess.Popen(command, env=os.environ | python.environment(), stdout=subprocess.DEVNULL)
    # All ranks poll, so that no collective waits longer than the timeout of the process group.
    while not any(ranks.all_max([converter is not None and converter.poll() is not None])):
        time.sleep(0.2)
    if any(ranks.all_max([converter is not None and converter.returncode != 0])):
        raise CheckpointError(
            f"{path}: cannot be converted for {ranks.size} ranks (is the disk full?); see the log of rank 0"
        )
    decay = [group["weight_decay"] for group in engine.optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    engine.load_checkpoint(str(universal), tag=ZERO)
    engine._config.load_universal_checkpoint = False
    # DeepSpeed gives all groups the decay of the first one, and one shared step counter, which each would advance.
    for group, own in zip(engine.optimizer.param_groups, decay, strict=True):
        group["weight_decay"] = own
    for moments in engine.optimizer.optimizer.state.values():
        moments["step"] = copy.deepcopy(moments["step"])
    ranks.barrier()
    if ranks.rank == 0:
        shutil.rmtree(universal)


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _share(names: Iterable[str], ranks: Ranks) -> list[str]:
    return sorted(names)[ranks.rank :: ranks.size]


def _sums(folder: Path, names: Iterable[str], flush: bool) -> dict[str, tuple[int, str]]:
    """Return (bytes, SHA-256) of each file, flushed to disk first if requested."""
    sums = {}
    for name in names:
        with (folder / name).open("rb") as file:
            if flush:
                os.fsync(file.fileno())
            sums[name] = (os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
    return sums


def _changed(path: Path, ranks: Ranks) -> str:
    """Return the first file of this rank's share whose content differs from what was saved; else ""."""
    manifest = read_manifest(path)
    for name, found in _sums(path, _share(manifest, ranks), flush=False).items():
        if manifest[name] != found:
            return f"{path / name}: its content has changed since it was saved (SHA-256 differs)"
    return ""


def _write_flushed(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
