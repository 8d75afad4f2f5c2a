"""`mmopd merge`: ExPO, weight extrapolation over several teachers (the baseline of Tables 1 and 2).

`theta = base + alpha * (sum_k w_k theta_k - base)`, where the w_k sum to 1: alpha = 1 is the mean of the teachers,
larger values go past it. Tensors are computed one after the other in float32 and rounded to the dtype of the base.
Memory holds one output file and the current tensor, never a whole model.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mmopd.errors import CheckpointError, UserError
from mmopd.model_folder import NOT_FINITE, is_finite, refuse_code
from mmopd.runtime.progress import Stage

WEIGHTS = "*.safetensors"


class Checkpoint:
    """Tensors of an HF folder by name, read one at a time. A context manager that holds the files open (mapped, not
    read).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        refuse_code(folder)
        self.files = sorted(folder.glob(WEIGHTS))
        if not self.files or not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder}: no model in this folder; it needs a config.json and weights in safetensors"
            )

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._open: dict[str, Any] = {}
            self.layout: dict[str, list[str]] = {}  # file -> its tensors
            for file in self.files:
                try:
                    handle = stack.enter_context(safe_open(file, "pt"))
                except Exception as error:
                    raise CheckpointError(f"{file}: cannot be read as safetensors ({error})") from None
                self.layout[file.name] = sorted(handle.keys())
                self._open |= dict.fromkeys(self.layout[file.name], handle)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._open)

    def shape(self, name: str) -> list[int]:
        """Return the shape of a tensor without reading it."""
        shape: list[int] = self._open[name].get_slice(name).get_shape()
        return shape

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor."""
        found: torch.Tensor = self._open[name].get_tensor(name)
        return found


def parse_teacher(text: str) -> tuple[Path, float]:
    """Return (folder, weight) of `FOLDER=WEIGHT`; the default weight is 1.

    Raises:
        UserError: the weight is not a number.
    """
    folder, equals, weight = text.rpartition("=")
    try:
        return (Path(folder), float(weight)) if equals else (Path(text), 1.0)
    except ValueError:
        raise UserError(f"{text!r}: expected FOLDER or FOLDER=WEIGHT, such as /models/math=2") from None


def merge(base: Path, teachers: Mapping[Path, float], alpha: float, out: Path, stage: Stage) -> None:
    """Write the extrapolated model as an HF folder, with the base's configuration, tokenizer and processor.

    Args:
        base: folder of the base model.
        teachers: folder -> weight, relative to each other.
        alpha: 1 is the mean of the teachers.
        out: folder to write; must not exist; it appears when it is complete.
        stage: where the progress is shown.

    Raises:
        CheckpointError: a folder has no model, or one of another architecture.
        UserError: a weight is not a positive number, or `out` exists.
    """
    if not teachers or any(not weight > 0 for weight in teachers.values()):
        raise UserError("merge needs teachers, each with a weight above 0: /models/math=1 /models/code=2")
    if out.exists():
        raise UserError(f"{out}: this folder exists already; choose another with --out, or remove it")
    shares = {folder: weight / sum(teachers.values()) for folder, weight in teachers.items()}
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            start = stack.enter_context(Checkpoint(base))
            others = {stack.enter_context(Checkpoint(folder)): share for folder, share in shares.items()}
            for other in others:
                _check_same(start, other)
            stage.total(len(start.names))
            for name, tensors in start.layout.items():  # same files as the base, so that its index stays valid
                merged = dict(_merged(start, others, tensors, alpha, stage))
                save_file(merged, partial / name, metadata={"format": "pt"})
        for file in base.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copyfile(file, partial / file.name)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _merged(
    base: Checkpoint, teachers: Mapping[Checkpoint, float], names: list[str], alpha: float, stage: Stage
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        start = base.tensor(name)
        if start.is_floating_point():
            mean = torch.zeros(start.shape)
            for teacher, share in teachers.items():
                mean += share * teacher.tensor(name).float()
            if not is_finite(mean):
                bad = next(teacher for teacher in teachers if not is_finite(teacher.tensor(name)))
                raise CheckpointError(f"{bad.folder}: the tensor {name!r} {NOT_FINITE}")
            if not is_finite(start):
                raise CheckpointError(f"{base.folder}: the tensor {name!r} {NOT_FINITE}")
            yield name, torch.lerp(start.float(), mean, alpha).to(start.dtype)
        elif all(torch.equal(start, teacher.tensor(name)) for teacher in teachers):
            yield name, start
        else:
            raise CheckpointError(
                f"{name}: an integer tensor that differs between base and teachers cannot be extrapolated"
            )
        stage.advance()


def _check_same(base: Checkpoint, teacher: Checkpoint) -> None:
    """Check that both have the same tensors with the same shapes."""
    if differ := sorted(base.names ^ teacher.names):
        where = base.folder if differ[0] in base.names else teacher.folder
        raise CheckpointError(
            f"{teacher.folder}: different architecture from {base.folder}: the tensor {differ[0]!r} is only in {where}"
        )
    for name in sorted(base.names):
        if (a := base.shape(name)) != (b := teacher.shape(name)):
            raise CheckpointError(
                f"{teacher.folder}: different architecture from {base.folder}: {name!r} has shape {b}, not {a}"
            )
