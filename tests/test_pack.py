import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from student_worker import plain
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_worker import make_items
from transformers import Qwen2_5_VLConfig

from mmopd.modality import Encoder
from mmopd.train.logprob import LogprobHead
from mmopd.train.pack import Collator, Layout, Size, assign, fill_rows
from mmopd.train.prefix_tree import Item
from mmopd.train.students import STUDENTS, load_student


@pytest.fixture(scope="module")
def items(encoder: Encoder) -> list[Item]:
    return make_items(encoder, "TitIItI", 0)


@pytest.fixture(scope="module")
def student(model: Path) -> Any:
    return STUDENTS["qwen3_vl"].from_pretrained(model).train()


def collator(encoder: Encoder, student: Any, layout: Layout = "masked") -> Collator:
    return Collator(encoder, student.model.get_rope_index, 3 * 2 * 16 * 16, 2, layout)


def long_tail(n: int, seed: int) -> list[Size]:
    draw = random.Random(seed)
    tokens = [min(16384, int(draw.lognormvariate(6.5, 1.1)) + 20) for _ in range(n)]
    return [Size(t * (1 + t / 30000), t, draw.choice([0, 0, 256, 1024])) for t in tokens]


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_assignment_uses_every_item_once_within_budgets_with_as_many_micro_steps_on_every_rank(ranks: int) -> None:
    sizes = long_tail(500, ranks)
    plan = assign(sizes, ranks, 16384, 8192)
    assert plan == assign(sizes, ranks, 16384, 8192)
    assert len(plan) == ranks
    assert len({len(steps) for steps in plan}) == 1
    bins = [b for steps in plan for b in steps]
    assert sorted(i for b in bins for i in b) == list(range(500))
    assert all(sum(sizes[i].tokens for i in b) <= 16384 and sum(sizes[i].patches for i in b) <= 8192 for b in bins)


def test_assignment_balances_the_ranks_and_fills_the_budget_of_a_long_tail() -> None:
    sizes = long_tail(2000, 5)
    plan = assign(sizes, 4, 16384, 1 << 20)
    cost = [sum(sizes[i].cost for b in steps for i in b) for steps in plan]
    assert max(cost) <= 1.02 * sum(cost) / 4
    assert sum(s.tokens for s in sizes) >= 0.95 * 16384 * 4 * len(plan[0])


def test_where_even_micro_batches_have_no_room_full_ones_save_a_micro_step() -> None:
    sizes = [Size(n, n, 0) for n in (6, 5, 4, 3, 2)]  # 6 + 3 and 5 + 4 leave no room for 2
    assert assign(sizes, 2, 10, 100) == [[[0, 2]], [[1, 3, 4]]]


def test_an_item_larger_than_the_budget_has_a_micro_batch_to_itself() -> None:
    sizes = [Size(n, n, 0) for n in (10, 500, 10, 10)]
    plan = assign(sizes, 2, 100, 100)
    assert [1] in [b for steps in plan for b in steps]
    assert len(plan[0]) == len(plan[1]) == 3  # 530 tokens would need no fewer than three micro-steps of 2 x 100


def test_too_few_items_leave_a_rank_with_an_empty_micro_batch() -> None:
    assert assign([Size(5, 5, 0)], 2, 100, 100) == [[[0]], [[]]]


def test_rows_hold_every_tree_once_and_are_nearly_full() -> None:
    draw = random.Random(1)
    lengths = [draw.randint(23, 37) for _ in range(128)]
    rows = fill_rows(lengths, "masked", 120)
    assert sorted(i for row in rows for i in row) == list(range(128))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled) <= 120
    assert sum(lengths) >= 0.9 * 120 * len(rows)
    assert fill_rows(lengths, "flash", 120) == [list(range(128))]
    assert fill_rows(lengths, "alone", 120) == [[i] for i in range(128)]


def test_a_text_micro_batch_has_one_blank_image(encoder: Encoder, student: Any, items: list[Item]) -> None:
    text = [k for k, item in enumerate(items) if not item.encoded.grids]
    batch = collator(encoder, student, "flash")(items, text)
    assert (batch.inputs["input_ids"] == encoder.image_token).sum() == 1
    assert batch.inputs["image_grid_thw"].tolist() == [[1, 2, 2]]
    assert sorted(batch.order) == text


def test_an_image_that_responses_share_is_decoded_once(
    encoder: Encoder, student: Any, items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    plain = encoder.pixel_values
    monkeypatch.setattr(encoder, "pixel_values", lambda e: decoded.append(e.prompt.key) or plain(e))
    batch = collator(encoder, student, "alone")(items, range(len(items)))
    assert len(decoded) == len(set(decoded)) < len(batch.inputs["media_index"]["image"])


def test_an_empty_micro_batch_is_one_blank_image_of_weight_zero(
    encoder: Encoder, student: Any, items: list[Item]
) -> None:
    batch = collator(encoder, student)(items, [])
    assert batch.order == []
    assert batch.weight.tolist() == [0.0]
    assert student(**batch.inputs).shape == (1,)


@pytest.mark.parametrize("layout", ["masked", "alone"])
def test_packed_log_probs_are_those_of_each_sample_alone(
    encoder: Encoder, student: Any, items: list[Item], layout: Layout
) -> None:
    batch = collator(encoder, student, layout)(items, range(len(items)))
    with torch.no_grad():
        flat = student(**batch.inputs)
    for i, packed in zip(batch.order, flat.split([len(items[i].tokens) for i in batch.order]), strict=True):
        torch.testing.assert_close(packed, plain(student, encoder, items[i]).detach(), rtol=1e-5, atol=1e-5)


def test_qwen2_5_vl_packs_too(encoder: Encoder, items: list[Item]) -> None:
    torch.manual_seed(0)
    student = STUDENTS["qwen2_5_vl"](qwen2_5_vl(encoder)).train()
    # Use the demo processor's patches of 16 x 16, so that both families see the same images.
    batch = collator(encoder, student)(items, range(len(items)))
    with torch.no_grad():
        flat = student(**batch.inputs)
    for i, packed in zip(batch.order, flat.split([len(items[i].tokens) for i in batch.order]), strict=True):
        torch.testing.assert_close(packed, plain(student, encoder, items[i]).detach(), rtol=1e-5, atol=1e-5)


def test_qwen2_5_vl_loads_from_a_folder_with_its_older_weight_names(encoder: Encoder, tmp_path: Path) -> None:
    student = STUDENTS["qwen2_5_vl"](qwen2_5_vl(encoder))
    student.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "model.norm.weight" in file.keys()  # noqa: SIM118 (no mapping)
    loaded = load_student(tmp_path, torch.float32)
    assert all(map(torch.equal, student.parameters(), loaded.parameters()))


def test_head_equals_plain_log_softmax_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    M, H, V = 2100, 32, 9000  # more rows and columns than one chunk holds
    hidden, targets = torch.randn(M, H, dtype=torch.float32), torch.randint(0, V, (M,))
    head = torch.nn.Linear(H, V, bias=False)
    weight, upstream = head.weight.detach().double().requires_grad_(), torch.randn(M)
    exact_hidden = hidden.double().requires_grad_()
    exact = (exact_hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    exact.backward(upstream.double())

    head.__class__ = LogprobHead
    ours = head(hidden.requires_grad_(), targets)
    ours.backward(upstream)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_never_holds_the_logits(dtype: torch.dtype, several: bool) -> None:
    torch.manual_seed(0)
    T, H, V = 512, 8, 20_000
    hidden, head = torch.randn(T, H, dtype=dtype, requires_grad=True), torch.nn.Linear(H, V, bias=False, dtype=dtype)
    targets = torch.randint(0, V, (T, 3) if several else (T,))
    with Largest() as naive:
        head(hidden).float().log_softmax(-1).sum().backward()
    head.__class__ = LogprobHead
    with Largest() as ours:
        head(hidden, targets).sum().backward()
    assert naive.numel == T * V
    assert H * V <= ours.numel <= T * V / 8


def test_head_of_bfloat16_answers_in_float32_and_gives_gradients_in_bfloat16() -> None:
    torch.manual_seed(0)
    M, H, V = 64, 32, 3000
    hidden, targets, head = torch.randn(M, H), torch.randint(0, V, (M,)), torch.nn.Linear(H, V, bias=False)
    exact = (
        (hidden.bfloat16().double() @ head.weight.bfloat16().double().T)
        .log_softmax(-1)
        .gather(1, targets[:, None])[:, 0]
    )
    head = head.bfloat16()
    head.__class__ = LogprobHead
    rows = hidden.bfloat16().requires_grad_()
    ours = head(rows, targets)
    ours.sum().backward()
    assert (ours.dtype, rows.grad.dtype, head.weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert (ours - exact).abs().max() < 4e-3  # log-probs near -8 are 0.03 apart in bfloat16


def test_head_without_targets_answers_with_logits() -> None:
    head = torch.nn.Linear(4, 6, bias=False)
    hidden = torch.randn(3, 4)
    plain = head(hidden)
    head.__class__ = LogprobHead
    assert torch.equal(head(hidden), plain)


class Largest(TorchDispatchMode):
    """Watch every operation, and record the number of elements of the largest tensor that one returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def qwen2_5_vl(encoder: Encoder) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        tie_word_embeddings=True,
        image_token_id=encoder.image_token,
        video_token_id=encoder.tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        text_config={
            "vocab_size": 1024,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 16,
            "window_size": 64,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
        },
    )
