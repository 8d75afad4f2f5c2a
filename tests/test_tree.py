"""Responses that share a prompt: the same results as separate samples, with less computation."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from train_worker import make_items
from transformers import AttentionInterface

from mmopd.modality import Encoder
from mmopd.train.pack import Collator, Cost, Layout, deal
from mmopd.train.prefix_tree import KEYS, Item, Tree, grow, mask, with_key_index
from mmopd.train.students import STUDENTS

VARIABLE = "variable_length"  # flash attention's interface, in plain torch


@pytest.fixture(scope="module")
def items(encoder: Encoder) -> list[Item]:
    """Return four responses to each of two texts and two images, dealt in turn, so that responses to one prompt are not
    adjacent.
    """
    some = make_items(encoder, "titi", 0)
    random = torch.Generator().manual_seed(1)
    found = []
    for k in range(16):
        encoded, T = some[k % 4].encoded, 1 + k
        tokens = tuple(torch.randint(5, 900, (T,), generator=random).tolist())
        found.append(
            Item(
                encoded, tokens, torch.full((T,), -7.0), torch.randn(T, generator=random), torch.full((T,), 1 / T / 16)
            )
        )
    return found


@pytest.fixture
def flash(model: Path) -> Iterator[Any]:
    """Return a student whose language model attends by sequences, as flash attention does."""
    AttentionInterface.register(VARIABLE, with_key_index(variable_length))
    student = STUDENTS["qwen3_vl"].from_pretrained(model).train()
    student.config.text_config._attn_implementation = VARIABLE
    yield student
    del AttentionInterface._global_mapping[VARIABLE]


def variable_length(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    **named: Any,
) -> tuple[Tensor, None]:
    """Compute what flash attention from 2.1 on computes: each sequence alone, queries aligned with the last keys."""
    assert attention_mask is None
    out = []
    spans = [list(pairwise(bounds.tolist())) for bounds in (cu_seq_lens_q, cu_seq_lens_k)]
    assert max_length_q == max(b - a for a, b in spans[0])
    assert max_length_k == max(b - a for a, b in spans[1])
    for (a, b), (c, d) in zip(*spans, strict=True):
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        q, k, v = query[:, :, a:b], key[:, :, c:d], value[:, :, c:d]
        out.append(scaled_dot_product_attention(q, k, v, seen, scale=scaling, enable_gqa=True))
    return torch.cat(out, 2).transpose(1, 2), None


def loss_and_gradient(student: Any, encoder: Encoder, items: list[Item], layout: Layout) -> tuple[Tensor, Tensor, int]:
    """Return (log-probs in the order of the items, all gradients, number of computed tokens)."""
    micro = Collator(encoder, student.model.get_rope_index, 3 * 2 * 16 * 16, 2, layout)(items, range(len(items)))
    student.zero_grad()
    logprobs = student(**micro.inputs)
    (logprobs * micro.advantage * micro.weight).sum().backward()
    parts = dict(zip(micro.order, logprobs.detach().split([len(items[i].tokens) for i in micro.order]), strict=True))
    return (
        torch.cat([parts[i] for i in range(len(items))]),
        torch.cat([p.grad.flatten() for p in student.parameters()]),
        micro.used,
    )


@pytest.mark.parametrize("layout", ["masked", "flash"])
def test_log_probs_and_gradients_of_responses_that_share_a_prompt_are_those_of_separate_samples(
    model: Path, encoder: Encoder, items: list[Item], flash: Any, layout: Layout
) -> None:
    student = STUDENTS["qwen3_vl"].from_pretrained(model).train()
    logprobs, gradient, used = loss_and_gradient(student, encoder, items, "alone")
    shared = loss_and_gradient(flash if layout == "flash" else student, encoder, items, layout)
    torch.testing.assert_close(shared[0], logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared[1], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))
    prompts = {item.encoded.prompt.key: len(item.encoded.expanded) for item in items}
    assert used == sum(item.length for item in items)
    assert shared[2] == sum(prompts.values()) + sum(len(item.tokens) for item in items)


def test_a_response_stands_where_it_would_stand_alone(model: Path, encoder: Encoder, items: list[Item]) -> None:
    student = STUDENTS["qwen3_vl"].from_pretrained(model)
    collate = Collator(encoder, student.model.get_rope_index, 3 * 2 * 16 * 16, 2, "masked")
    of_prompt = [i for i, item in enumerate(items) if item.encoded is items[1].encoded]
    tree = Tree.of(items, of_prompt, collate._positions(items[1].encoded))
    P = tree.lengths[0]
    for k, i in enumerate(of_prompt, start=1):
        ids = torch.tensor([items[i].encoded.expanded + items[i].tokens])
        kinds = (ids == encoder.image_token).int()
        mrope, _ = student.model.get_rope_index(ids, kinds, torch.tensor(items[i].encoded.grids), None)
        mine = torch.cat([torch.arange(P), (tree.branches == k).nonzero()[:, 0]])
        assert torch.equal(tree.ids[mine], ids[0])
        assert torch.equal(tree.positions[1:, mine], mrope[:, 0])
        assert torch.equal(tree.positions[0, mine], torch.arange(ids.shape[1]))


def test_what_a_token_sees_by_hand() -> None:
    def tree(*lengths: int) -> Tree:
        return Tree(
            (), torch.zeros(sum(lengths), dtype=torch.long), torch.zeros(4, sum(lengths), dtype=torch.long), lengths
        )

    seen = mask([[tree(2, 1, 2), tree(1)], [tree(1, 1)]], width=6)
    rows = [["".join("x" if cell else "." for cell in query) for query in row[0].tolist()] for row in seen]
    assert rows[0] == ["x.....", "xx....", "xxx...", "xx.x..", "xx.xx.", ".....x"]
    assert rows[1] == ["x.....", "xx....", "..x...", "...x..", "....x.", ".....x"]


def test_trees_hold_every_item_once_by_prompt_and_within_the_limit(items: list[Item]) -> None:
    for limit in (0, 60, 100, 10_000):
        trees = grow(items, range(16), limit)
        assert sorted(i for tree in trees for i in tree) == list(range(16))
        for tree in trees:
            assert len({items[i].encoded.prompt.key for i in tree}) == 1
            assert (
                len(tree) == 1
                or len(items[tree[0]].encoded.expanded) + sum(len(items[i].tokens) for i in tree) <= limit
            )
    assert len(grow(items, range(16), 0)) == 16
    assert len(grow(items, range(16), 10_000)) == 4


def test_the_responses_of_a_prompt_are_dealt_together_as_far_as_ranks_stay_alike(items: list[Item]) -> None:
    cost = Cost(hidden=64, patch=0.3)
    for ranks, together in ((1, True), (2, True), (2, False)):
        plan = deal(items, ranks, 4096, 4096, cost, together=together)
        dealt = [i for steps in plan for micro in steps for i in micro]
        assert sorted(dealt) == list(range(16))
        trees = [len(grow(items, micro, 10_000)) for steps in plan for micro in steps]
        assert sum(trees) <= (8 if together else 16)
        work = [
            sum(cost.of([items[i] for i in tree]).cost for micro in steps for tree in grow(items, micro, 10_000))
            for steps in plan
        ]
        assert max(work) <= 1.2 * min(work)


def test_repeated_keys_are_bounded(encoder: Encoder) -> None:
    encoded = make_items(encoder, "i", 0)[0].encoded
    long = [Item.to_score(replace(encoded, expanded=encoded.expanded * 20), (5, 6)) for _ in range(32)]
    P = len(long[0].encoded.expanded)
    trees = grow(long, range(32), 100_000)
    assert len(trees) > 1
    for tree in trees:
        assert (1 + len(tree)) * P + 2 * len(tree) <= KEYS * (P + 2 * len(tree))
