"""`mmopd replay RUN STEP`: compute a skipped update again, response by response.

`mmopd.train.skipped` has saved the batch and the student of that step. Here each response is computed alone, forward
and backward: if responses are packed into one row, one that is not finite makes the others not finite too.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from mmopd.algorithm.settings import Algorithm
from mmopd.config import Recipe
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.runtime.run_folder import RunFolder, step_of
from mmopd.train.pack import Collator
from mmopd.train.prefix_tree import Item
from mmopd.train.skipped_batch import read_batch
from mmopd.train.students import load_student
from mmopd.train.trainer import collator, loss_of

MODEL = "model"  # folder of the student of that step, next to the batch
SHOWN = 20  # maximum number of responses in the table


@dataclass(frozen=True, slots=True)
class Found:
    """Contribution of a response of T tokens to the update."""

    item: Item
    logprob: Tensor  # [T] by the student of that step
    loss: float  # its part of the loss
    gradient: float  # norm of its part of the gradient

    @property
    def ratio(self) -> Tensor:
        """[T] log-prob by the student minus the log-prob at sampling."""
        return self.logprob - self.item.old

    @property
    def wrong(self) -> dict[str, list[int]]:
        """Positions of tokens with values that are not finite, by the name of the value."""
        item = self.item
        numbers = {
            "log-prob": self.logprob,
            "sampled log-prob": item.old,
            "advantage": item.advantage,
            "weight": item.weight,
        }
        if item.likeliest is not None:
            numbers["teacher's likeliest"] = item.likeliest[1].sum(1)
        return {name: at for name, x in numbers.items() if (at := (~x.isfinite()).nonzero().flatten().tolist())}

    @property
    def finite(self) -> bool:
        """True if the update is finite with this response."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient)


def replay(run: RunFolder, step: int, console: Console) -> list[Found]:
    """Compute the batch of a skipped update again and print the result of each response, the worst ones first.

    Raises:
        UserError: no batch of this step is saved; the message lists those that are.
        CheckpointError: the student does not load.
    """
    folder = run.replay_of(step)
    recipe = run.recipe()
    if not folder.is_dir():
        there = ", ".join(str(step_of(path.name)) for path in sorted(run.replay.glob("step-*")))
        raise UserError(f"{run.root}: no skipped update of step {step} is saved; saved steps: {there or 'none'}")
    items, about = read_batch(folder)
    console.print(
        f"step {step}: {about['reason']}. {len(items)} responses, with the weights of {folder / MODEL}", markup=False
    )
    encoder = Encoder(folder / MODEL)
    student = _load(folder / MODEL, recipe)
    if broken := [name for name, weight in student.named_parameters() if not weight.isfinite().all()]:
        console.print(f"[red]{len(broken)} weights of the student are not finite[/], such as {broken[0]}")
    compute = _computer(student, collator(student, encoder), recipe.algorithm)
    found = sorted((compute(item) for item in items), key=lambda one: (one.finite, -_largest(one.ratio)[0]))
    console.print(table(found[:SHOWN], lambda token: repr(encoder.tokenizer.decode([token]))))
    wrong = sum(not one.finite for one in found)
    console.print(
        f"{wrong} of {len(found)} responses are not finite" + (f"; {SHOWN} are shown" if len(found) > SHOWN else "")
    )
    return found


def table(found: Sequence[Found], text: Callable[[int], str]) -> Table:
    """Return a table with a line for each response.

    Args:
        found: the responses.
        text: gives the text of a token.
    """
    head = Table(title="Responses of the skipped update; ratio is pi / pi that sampled", title_justify="left")
    for column in ("prompt", "tokens", "loss", "gradient norm", "largest ratio", "not finite"):
        head.add_column(column, justify="right" if column in {"tokens", "loss", "gradient norm"} else "left")
    for one in found:
        tokens = one.item.tokens
        ratio, at = _largest(one.ratio)
        largest = (
            f"{math.exp(min(ratio, 700.0)):.4g} at {at} {text(tokens[at])}" if at is not None else "none is finite"
        )
        wrong = "; ".join(
            f"{name} of {len(at)}, the first at {at[0]} {text(tokens[at[0]])}" for name, at in one.wrong.items()
        )
        numbers = (
            str(len(tokens)),
            f"{one.loss:.4g}",
            f"{one.gradient:.4g}",
            largest,
            wrong or ("" if one.finite else "its gradient"),
        )
        head.add_row(escape(one.item.encoded.prompt.key), *map(escape, numbers), style="" if one.finite else "red")
    return head


def _load(folder: Path, recipe: Recipe) -> Any:
    student = load_student(folder, getattr(torch, recipe.train.dtype), finite=False).to(
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    if recipe.train.gradient_checkpointing:
        student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return student.train()


def _computer(student: Any, collate: Collator, algorithm: Algorithm) -> Callable[[Item], Found]:
    """Return a function that computes one response alone."""

    def compute(item: Item) -> Found:
        micro = collate([item], [0]).to(student.device)
        loss, logprob = loss_of(student(**micro.inputs), micro, algorithm)
        student.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.double().norm() for p in student.parameters() if p.grad is not None]).norm()
        return Found(item, logprob.detach().cpu(), loss.item(), norm.item())

    return compute


def _largest(ratio: Tensor) -> tuple[float, int | None]:
    """Return the finite log ratio that is farthest from 0, and its position; (0, None) if none is finite."""
    size = ratio.abs().masked_fill(~ratio.isfinite(), -1.0)
    at = int(size.argmax())
    return (float(ratio[at]), at) if size[at] >= 0 else (0.0, None)
