"""Pack responses into micro-batches: which rank computes which, when, and as which tensors.

There are three steps. `deal` gives items to (rank, micro-step), those of a prompt together, from sizes alone, so every
rank knows the whole assignment without communication. `fill_rows` packs the trees of one micro-batch into rows.
`Collator` makes the tensors; only the rank that computes a micro-batch decodes its images.

With flash attention one row holds all trees; torch's attention computes a W x W mask per row, so rows are short there.
With a vision tower every micro-batch has at least one image, a blank one if need be: ZeRO-3 needs the tower to run
equally often on every rank. The items of all media go through it in one call.

Letters: T tokens of a response, B rows, W width, M response tokens of a micro-batch, I items of media.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmopd.modality import Encoder
from mmopd.modality.registry import grids_by_slot, shown_items, slots
from mmopd.records import Encoded
from mmopd.train.prefix_tree import Item, Tree, grow, mask, sequences

# Tokens of a row for torch's attention, whose mask is W x W; three times the longest sample if that is more.
ROW = 256
# Rows for torch's attention; one row for flash attention; one sample per row, without a tree.
Layout = Literal["masked", "flash", "alone"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The tensors of one forward and backward pass."""

    inputs: dict[str, Any]  # arguments of the student's forward
    used: int  # computed tokens that are not padding
    old: Float[Tensor, " M"]
    advantage: Float[Tensor, " M"]
    weight: Float[Tensor, " M"]
    order: list[int]  # numbers of its items, in the order of their tokens; [] for a dummy, which has M = 1 of weight 0
    # Log-probs by the teacher of its K likeliest tokens, whose log-probs by the student are then computed, too.
    likeliest: Float[Tensor, "M K"] | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the micro-batch on another device."""
        inputs = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        likeliest = self.likeliest.to(device) if self.likeliest is not None else None
        return MicroBatch(
            inputs,
            self.used,
            self.old.to(device),
            self.advantage.to(device),
            self.weight.to(device),
            self.order,
            likeliest,
        )


class Size(NamedTuple):
    """The size of a piece of work, as `assign` sees it."""

    cost: float  # of its forward and backward pass, in any unit
    tokens: int
    patches: int


class Cost(NamedTuple):
    """The properties of a model that determine its work."""

    hidden: int
    patch: float  # ratio of vision to language parameters

    def of(self, tree: Sequence[Item]) -> Size:
        """Return the size of a tree, with the cost in tokens without attention.

        Each pair of a token and one that it attends to adds 1 / (6 H); a patch adds `patch`.
        """
        prompt = len(tree[0].encoded.expanded)
        responses = [len(item.tokens) for item in tree]
        tokens = prompt + sum(responses)
        seen = prompt**2 / 2 + sum(T * (prompt + T / 2) for T in responses)
        return Size(tokens + seen / (6 * self.hidden) + tree[0].patches * self.patch, tokens, tree[0].patches)


def deal(
    items: Sequence[Item], ranks: int, max_tokens: int, max_patches: int, cost: Cost, *, together: bool = True
) -> list[list[list[int]]]:
    """Return item numbers by [rank][micro-step], as `assign` does; a prompt's items stay together if balance allows.

    Args:
        together: False for a student that computes each sample separately.
    """
    limit = min(sum(item.length for item in items) // (4 * ranks), max_tokens // 4) if together else 0
    trees = grow(items, range(len(items)), limit)
    plan = assign([cost.of([items[i] for i in tree]) for tree in trees], ranks, max_tokens, max_patches)
    return [[[i for k in step for i in trees[k]] for step in steps] for steps in plan]


def assign(sizes: Sequence[Size], ranks: int, max_tokens: int, max_patches: int) -> list[list[list[int]]]:
    """Return numbers in `sizes` by [rank][micro-step], within the budgets and balanced by cost.

    Uses the smallest number of micro-steps for which one of the two methods of `_bins` finds room. All ranks have the
    same number of micro-steps, and similar costs within each. A piece that exceeds a budget gets its own micro-batch.
    """
    steps = max(
        1,
        -(-sum(s.tokens for s in sizes) // (ranks * max_tokens)),
        -(-sum(s.patches for s in sizes) // (ranks * max_patches)),
    )
    budgets = max_tokens, max_patches
    while (bins := _bins(sizes, ranks * steps, *budgets) or _bins(sizes, ranks * steps, *budgets, tight=True)) is None:
        steps += 1
    bins.sort(key=lambda b: -sum(sizes[i].cost for i in b))
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    for step in range(steps):
        # Every other step is dealt in reverse, so that no rank always has the cheapest micro-batch.
        dealt = bins[step * ranks : (step + 1) * ranks][:: 1 if step % 2 == 0 else -1]
        for rank in range(ranks):
            plan[rank].append(sorted(dealt[rank]))
    return plan


def _bins(
    sizes: Sequence[Size], n: int, max_tokens: int, max_patches: int, *, tight: bool = False
) -> list[list[int]] | None:
    """Return `n` bins, or None if a piece finds no room.

    By default, the most expensive piece goes first, into the cheapest bin that has room (LPT), which balances the bins.
    With `tight` the largest goes first, into the fullest bin that has room (best fit), which may need fewer bins.
    """
    bins: list[list[int]] = [[] for _ in range(n)]
    cost = np.zeros(n)
    tokens = np.zeros(n)
    patches = np.zeros(n)
    large = [max(s.tokens / max_tokens, s.patches / max_patches) if tight else s.cost for s in sizes]
    for i in sorted(range(len(sizes)), key=lambda i: (-large[i], i)):
        room = (tokens == 0) | ((tokens + sizes[i].tokens <= max_tokens) & (patches + sizes[i].patches <= max_patches))
        if not room.any():
            return None
        b = int(np.where(room, -tokens if tight else cost, np.inf).argmin())
        bins[b].append(i)
        cost[b] += sizes[i].cost
        tokens[b] += sizes[i].tokens
        patches[b] += sizes[i].patches
    return bins


def fill_rows(lengths: Sequence[int], layout: Layout, width: int) -> list[list[int]]:
    """Return positions in `lengths` by row: one per row, all in one, or first-fit decreasing into rows of `width`."""
    if layout == "alone":
        return [[i] for i in range(len(lengths))]
    if layout == "flash":
        return [list(range(len(lengths)))]
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if row is None:
            rows.append([i])
            room.append(width - lengths[i])
        else:
            rows[row].append(i)
            room[row] -= lengths[i]
    return rows


class Collator:
    """Makes the tensors of a micro-batch.

    Args:
        encoder: decodes the items of media, and knows their placeholders.
        rope: the model's `get_rope_index`; None for a language model, whose micro-batches have no images.
        patch_size: values per vision patch (channels x time x rows x columns).
        merge: patches per visual token, per side.
        layout: what the student's attention takes; `alone` for a model whose state would run on into the next sample.
    """

    def __init__(
        self, encoder: Encoder, rope: Callable[..., Any] | None, patch_size: int, merge: int, layout: Layout
    ) -> None:
        self.encoder = encoder
        self.rope = rope
        self.patch_size = patch_size
        self.merge = merge
        self.layout = layout

    def __call__(self, items: Sequence[Item], chosen: Sequence[int]) -> MicroBatch:
        """Return the micro-batch of the `chosen` items; a dummy of weight 0 if there are none."""
        room = max([ROW, *(3 * items[i].length for i in chosen)])
        limit = {"masked": room, "flash": sum(items[i].length for i in chosen), "alone": 0}[self.layout]
        trees = [
            Tree.of(items, numbers, self._positions(items[numbers[0]].encoded))
            for numbers in grow(items, chosen, limit)
        ]
        if not trees or (self.rope is not None and not any(items[i].patches for i in chosen)):
            trees.append(Tree.blank(self.encoder.image_token))
        lengths = [len(tree.ids) for tree in trees]
        rows = [[trees[k] for k in row] for row in fill_rows(lengths, self.layout, room)]
        width = max(sum(len(tree.ids) for tree in row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        # Without a mask, padding is samples of one token each.
        positions = torch.zeros(4, len(rows), width, dtype=torch.long)
        index: list[Tensor] = []
        pictures = _Pictures(self.encoder, self.patch_size, self.merge)
        for r, row in enumerate(rows):
            end = 0
            for tree in row:
                begin, end = end, end + len(tree.ids)
                ids[r, begin:end] = tree.ids
                positions[:, r, begin:end] = tree.positions
                if tree.numbers:
                    index.append(r * width + begin + tree.predictors)
                    pictures.add(items[tree.numbers[0]].encoded)
                elif self.rope is not None:
                    pictures.add_blank()
        order = [i for tree in chain.from_iterable(rows) for i in tree.numbers]
        none = [torch.zeros(1)] * 3
        old, advantage, weight = (
            [torch.cat([getattr(items[i], n) for i in order]).float() for n in ("old", "advantage", "weight")]
            if order
            else none
        )
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": positions if self.rope is not None else positions[0],
            "logprob_index": torch.cat(index) if order else torch.zeros(1, dtype=torch.long),
            "logprob_targets": torch.tensor([t for i in order for t in items[i].tokens] or [0]),
        }
        if self.rope is not None:
            inputs |= {
                "pixel_values": torch.cat(pictures.pixels),
                "image_grid_thw": torch.cat(pictures.grids),
                "media_index": pictures.index,
            }
        if self.layout == "masked":
            inputs["attention_mask"] = mask(rows, width)
        elif self.layout == "flash":
            inputs |= sequences(rows[0])
        tops = [top for i in order if (top := items[i].likeliest) is not None]
        if tops:  # [M, 1 + K]: the sampled token, then the teacher's likeliest
            inputs["logprob_targets"] = torch.cat(
                [inputs["logprob_targets"][:, None], torch.cat([ids for ids, _ in tops])], 1
            )
        likeliest = torch.cat([logprobs for _, logprobs in tops]) if tops else None
        return MicroBatch(inputs, sum(lengths), old, advantage, weight, order, likeliest)

    def _positions(self, encoded: Encoded) -> Int[Tensor, "4 P"]:
        """Return positions [4, P] of a prompt: text, then mRoPE's time, row and column."""
        ids = torch.tensor(encoded.expanded)
        text = torch.arange(len(ids))
        if self.rope is None or not encoded.prompt.is_visual:
            return text.expand(4, -1)
        types = torch.zeros_like(ids, dtype=torch.int32)
        for slot, media in slots().items():
            types[ids == self.encoder.tokens[slot]] = media[0].token_type
        grids = {
            f"{slot}_grid_thw": torch.tensor(grids) if grids else None for slot, grids in grids_by_slot(encoded).items()
        }
        mrope, _ = self.rope(ids[None], types[None], **grids)
        return torch.cat([text[None], mrope[:, 0]])


class _Pictures:
    """The items of media of a micro-batch; those of a prompt are decoded once, however many responses share it."""

    def __init__(self, encoder: Encoder, patch_size: int, merge: int) -> None:
        self.encoder = encoder
        self.patch_size = patch_size
        self.merge = merge
        self.pixels: list[Tensor] = []  # each [patches, patch_size]
        self.grids: list[Tensor] = []  # each [I, 3]
        self.index: dict[str, list[int]] = {slot: [] for slot in slots()}  # item -> row of the grids
        self._seen: dict[str, range] = {}

    def add(self, encoded: Encoded) -> None:
        if not encoded.grids:
            return
        key = encoded.prompt.key
        if key not in self._seen:
            pixels, grids = self.encoder.pixel_values(encoded)
            first = sum(map(len, self.grids))
            self._seen[key] = range(first, first + len(grids))
            self.pixels.append(pixels)
            self.grids.append(grids)
        for row, (medium, _) in zip(self._seen[key], shown_items(encoded.prompt), strict=True):
            self.index[medium.slot].append(row)

    def add_blank(self) -> None:
        self.pixels.append(torch.zeros(self.merge**2, self.patch_size))
        self.grids.append(torch.tensor([[1, self.merge, self.merge]]))
        self.index["image"].append(0)
