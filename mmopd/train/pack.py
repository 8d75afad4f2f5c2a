"""Responses as micro-batches: which rank computes which, when, and as which tensors.

Three steps. `assign` deals items to (rank, micro-step) from sizes alone, so every rank knows the whole
assignment without talking. `fill_rows` packs the items of one micro-batch into rows. `Collator` makes the tensors;
only the rank that computes a micro-batch decodes its images.

A row holds several samples. Position ids that restart at 0 keep them apart (transformers sees packing in row 0 of
[4, B, W]; rows 1-3 are mRoPE). With flash attention one row holds all; torch's attention computes a W x W mask
per row, so rows are short there. Every micro-batch has at least one image, a blank one if need be: ZeRO-3 needs the
vision tower to run as often on every rank. Images and clips go through it in one call.

Letters: T tokens of a sample, B rows, W width, M response tokens of a micro-batch, I images and clips.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmopd.modality import Encoder
from mmopd.records import Encoded

SAMPLES_PER_ROW = 3  # width of a row of torch's attention, in longest samples: less padding against a larger mask


@dataclass(frozen=True, slots=True)
class Item:
    """A response of T tokens, with what its loss is made of."""

    encoded: Encoded
    tokens: tuple[int, ...]
    old: Tensor  # [T] log-probs of the policy that sampled it
    advantage: Tensor  # [T]
    weight: Tensor  # [T] of each token in the loss; 0 = left out
    likeliest: tuple[Tensor, Tensor] | None = None  # (ids [T, K], log-probs [T, K]) of the teacher's likeliest tokens; all items or none

    @classmethod
    def to_score(cls, encoded: Encoded, tokens: tuple[int, ...]) -> "Item":
        """An item that is only asked for its log-probs."""
        nothing = torch.zeros(len(tokens))
        return cls(encoded, tokens, nothing, nothing, nothing)

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.encoded.expanded) + len(self.tokens)

    @property
    def patches(self) -> int:
        """Vision patches of its images and clips."""
        return sum(t * h * w for t, h, w in (*self.encoded.grids, *self.encoded.video_grids))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The tensors of one forward and backward pass."""

    inputs: dict[str, Any]  # arguments of the student's forward
    old: Tensor  # [M]
    advantage: Tensor  # [M]
    weight: Tensor  # [M]
    order: list[int]  # numbers of its items, in the order of their tokens; [] for a dummy, which has M = 1 of weight 0
    likeliest: Tensor | None = None  # [M, K] log-probs by the teacher of its likeliest tokens, which then are asked for, too

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        inputs = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        likeliest = self.likeliest.to(device) if self.likeliest is not None else None
        return MicroBatch(inputs, self.old.to(device), self.advantage.to(device), self.weight.to(device), self.order, likeliest)


class Size(NamedTuple):
    """What `assign` knows of an item."""

    cost: float  # of its forward and backward pass, in any unit
    tokens: int
    patches: int


def assign(sizes: Sequence[Size], ranks: int, max_tokens: int, max_patches: int) -> list[list[list[int]]]:
    """Item numbers by [rank][micro-step], within the budgets and balanced by cost.

    The smallest number of micro-steps for which "dearest item first, onto the cheapest micro-batch that has room" (LPT)
    succeeds; the same number on every rank, and costs that are alike within a micro-step. An item larger than a
    budget gets a micro-batch to itself.
    """
    steps = max(1, -(-sum(s.tokens for s in sizes) // (ranks * max_tokens)), -(-sum(s.patches for s in sizes) // (ranks * max_patches)))
    while (bins := _deal(sizes, ranks * steps, max_tokens, max_patches)) is None:
        steps += 1
    bins.sort(key=lambda b: -sum(sizes[i].cost for i in b))
    plan: list[list[list[int]]] = [[] for _ in range(ranks)]
    for step in range(steps):
        # Every other step is dealt backwards, so that no rank always has the cheapest micro-batch.
        dealt = bins[step * ranks : (step + 1) * ranks][:: 1 if step % 2 == 0 else -1]
        for rank in range(ranks):
            plan[rank].append(sorted(dealt[rank]))
    return plan


def _deal(sizes: Sequence[Size], n: int, max_tokens: int, max_patches: int) -> list[list[int]] | None:
    """`n` bins by LPT, or None where an item finds no room."""
    bins: list[list[int]] = [[] for _ in range(n)]
    tokens, patches = [0] * n, [0] * n
    cheapest = [(0.0, b) for b in range(n)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i].cost, i)):
        full = []
        while cheapest:
            cost, b = heapq.heappop(cheapest)
            if not bins[b] or (tokens[b] + sizes[i].tokens <= max_tokens and patches[b] + sizes[i].patches <= max_patches):
                break
            full.append((cost, b))
        else:
            return None
        bins[b].append(i)
        tokens[b] += sizes[i].tokens
        patches[b] += sizes[i].patches
        for entry in (*full, (cost + sizes[i].cost, b)):
            heapq.heappush(cheapest, entry)
    return bins


def fill_rows(lengths: Sequence[int], single_row: bool, alone: bool = False) -> list[list[int]]:
    """Positions in `lengths` by row: one in each, all in one, or first-fit decreasing into rows of SAMPLES_PER_ROW longest samples."""
    if alone:
        return [[i] for i in range(len(lengths))]
    if single_row:
        return [list(range(len(lengths)))]
    width = SAMPLES_PER_ROW * max(lengths)
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
        encoder: decodes images, and knows the tokens that stand for images and clips.
        rope: the model's `get_rope_index`.
        patch_size: numbers per vision patch (channels x time x rows x columns).
        merge: patches per visual token, per side.
        single_row: one row for all samples (flash attention).
        alone: one row for each sample (a model whose state would run on into the next one).
    """

    def __init__(
        self, encoder: Encoder, rope: Callable[..., Any], patch_size: int, merge: int, single_row: bool, *, alone: bool = False
    ) -> None:
        self.encoder = encoder
        self.rope = rope
        self.patch_size = patch_size
        self.merge = merge
        self.single_row, self.alone = single_row, alone

    def __call__(self, items: Sequence[Item], chosen: Sequence[int]) -> MicroBatch:
        """The micro-batch of the `chosen` items; a dummy of weight 0 if none are."""
        samples = [self._sample(items[i], i) for i in chosen]
        if not any(items[i].patches for i in chosen):
            samples.append(_Sample(None, torch.tensor([self.encoder.image_token]), torch.zeros(4, 1, dtype=torch.long)))
        rows = [[samples[k] for k in row] for row in fill_rows([len(s.ids) for s in samples], self.single_row, self.alone)]
        width = max(sum(len(s.ids) for s in row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        positions = torch.zeros(4, len(rows), width, dtype=torch.long)  # padding: samples of one token each
        index: list[Tensor] = []
        order: list[int] = []
        pictures = _Pictures(self.encoder, self.patch_size, self.merge)
        for r, row in enumerate(rows):
            end = 0
            for sample in row:
                begin, end = end, end + len(sample.ids)
                ids[r, begin:end] = sample.ids
                positions[:, r, begin:end] = sample.positions
                if sample.number is None:
                    pictures.add_blank()
                    continue
                item = items[sample.number]
                pictures.add(item.encoded)
                order.append(sample.number)
                index.append(torch.arange(r * width + end - len(item.tokens) - 1, r * width + end - 1))  # a token is predicted one earlier
        none = [torch.zeros(1)] * 3
        old, advantage, weight = (
            [torch.cat([getattr(items[i], n) for i in order]).float() for n in ("old", "advantage", "weight")] if order else none
        )
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": positions,
            "pixel_values": torch.cat(pictures.pixels),
            "image_grid_thw": torch.cat(pictures.grids),
            "image_index": pictures.images,
            "video_index": pictures.videos,
            "logprob_index": torch.cat(index) if order else torch.zeros(1, dtype=torch.long),
            "logprob_targets": torch.tensor([t for i in order for t in items[i].tokens] or [0]),
        }
        tops = [top for i in order if (top := items[i].likeliest) is not None]
        if tops:  # [M, 1 + K]: the sampled token, then the teacher's likeliest
            inputs["logprob_targets"] = torch.cat([inputs["logprob_targets"][:, None], torch.cat([ids for ids, _ in tops])], 1)
        return MicroBatch(inputs, old, advantage, weight, order, torch.cat([logprobs for _, logprobs in tops]) if tops else None)

    def _sample(self, item: Item, number: int) -> "_Sample":
        ids = torch.tensor(item.encoded.expanded + item.tokens)
        text = torch.arange(len(ids))
        if not item.patches:
            return _Sample(number, ids, text.expand(4, -1))
        kinds = (ids == self.encoder.image_token).int() + 2 * (ids == self.encoder.video_token).int()
        grids = [torch.tensor(grids) if grids else None for grids in (item.encoded.grids, item.encoded.video_grids)]
        mrope, _ = self.rope(ids[None], kinds[None], *grids)
        return _Sample(number, ids, torch.cat([text[None], mrope[:, 0]]))


@dataclass(frozen=True, slots=True)
class _Sample:
    """What rows are filled with."""

    number: int | None  # of the item; None for the blank image
    ids: Tensor  # [T]
    positions: Tensor  # [4, T]: text, then mRoPE's time, row and column


class _Pictures:
    """The images and clips of a micro-batch: each prompt's decoded once, however many responses it has here."""

    def __init__(self, encoder: Encoder, patch_size: int, merge: int) -> None:
        self.encoder = encoder
        self.patch_size = patch_size
        self.merge = merge
        self.pixels: list[Tensor] = []  # each [patches, patch_size]
        self.grids: list[Tensor] = []  # each [I, 3]
        self.images: list[int] = []  # image of the micro-batch -> row of the grids
        self.videos: list[int] = []  # clip of the micro-batch -> row of the grids
        self._seen: dict[str, range] = {}

    def add(self, encoded: Encoded) -> None:
        if not encoded.grids and not encoded.video_grids:
            return
        key = encoded.prompt.key
        if key not in self._seen:
            pixels, grids = self.encoder.pixel_values(encoded)
            first = sum(map(len, self.grids))
            self._seen[key] = range(first, first + len(grids))
            self.pixels.append(pixels)
            self.grids.append(grids)
        rows, images = self._seen[key], len(encoded.grids)
        self.images += rows[:images]
        self.videos += rows[images:]

    def add_blank(self) -> None:
        self.pixels.append(torch.zeros(self.merge**2, self.patch_size))
        self.grids.append(torch.tensor([[1, self.merge, self.merge]]))
        self.images.append(0)
