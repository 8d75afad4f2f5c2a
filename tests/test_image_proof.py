"""The trainer must see what prompts show, in every family of students; one whose image path is cut is refused."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from student_worker import SEEING, build
from torch import Tensor

from mmopd.demo.world import additions, digit_sums
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.prompts.rows import RowError
from mmopd.records import Prompt
from mmopd.train.image_proof import TRIED, prove_sight
from mmopd.train.prefix_tree import Item
from mmopd.train.students import load_student
from mmopd.train.trainer import collator


class Rows(list[Prompt]):
    """Prompts in place of shards; the first row cannot be read."""

    def __getitem__(self, row: Any) -> Any:
        if row == 0:
            raise RowError("missing", "no such file")
        return super().__getitem__(row)

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        super().__init__(prompts)
        self.kinds = {("task", prompt.modality): 1 for prompt in prompts}


def prompts(kind: str, number: int) -> list[Prompt]:
    rows = (digit_sums if kind == "image" else additions)("train", number, 3)
    return [
        Prompt(f"{kind}/{i}", "task", kind, tuple(row["messages"]), tuple(row["images"]), "12")
        for i, row in enumerate(rows)
    ]


def computer(student: Any, encoder: Encoder, calls: list[int]) -> Callable[[Sequence[Item]], list[Tensor]]:
    """Return the trainer's log-probs, without DeepSpeed."""
    collate = collator(student, encoder)

    def logprobs(items: Sequence[Item]) -> list[Tensor]:
        calls.append(len(items))
        micro = collate(items, range(len(items)))
        with torch.no_grad():
            flat = student(**micro.inputs)
        return list(flat.split([len(items[i].tokens) for i in micro.order]))

    return logprobs


@pytest.mark.parametrize("kind", SEEING)
def test_a_student_sees_its_images_and_one_whose_image_path_is_cut_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(kind, tmp_path / "model")
    encoder = Encoder(tmp_path / "model")
    student = load_student(tmp_path / "model", torch.float32).train()
    sources: Any = [Rows(prompts("text", 2)), Rows(prompts("image", 6))]
    calls: list[int] = []
    prove_sight(computer(student, encoder, calls), sources, encoder)
    assert calls == [1, 1]
    whole = student.model.forward

    def cut(*args: Any, mm_encoder_outputs: Any, **more: Any) -> Any:
        """Drop the output of the tower, as the `**kwargs` of transformers 5.17 does."""
        return whole(*args, **more)

    monkeypatch.setattr(student.model, "forward", cut)
    with pytest.raises(UserError, match=r"does not see the images of its prompts: .* image/1 .*transformers \d"):
        prove_sight(computer(student, encoder, calls), sources, encoder)
    assert calls == [1] * (2 + 2 * TRIED)


def test_a_mixture_of_text_costs_nothing() -> None:
    sources: Any = [Rows(prompts("text", 3))]
    prove_sight(lambda items: pytest.fail("computed"), sources, SimpleNamespace())
