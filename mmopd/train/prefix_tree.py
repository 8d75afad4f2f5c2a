"""Responses that share a prompt, as a tree: the prompt is computed once, and each response as if it were alone with it.

A group of G takes P + T_1 + ... + T_G tokens instead of G P + T_1 + ... + T_G. Each token has the same context and
position as in a separate sample, so log-probs and gradients are the same too. Torch's attention gets a mask; flash
attention gets sequences that have more keys than queries: a response's keys are the prompt's and its own [not run on
GPU].

Letters: P tokens of a prompt, T of a response, B rows, W width of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmopd.records import Encoded
from mmopd.train.limits import KEYS


@dataclass(frozen=True, slots=True)
class Item:
    """A response of T tokens, with the inputs of its loss."""

    encoded: Encoded
    tokens: tuple[int, ...]
    old: Float[Tensor, " T"]  # log-probs of the policy that sampled it
    advantage: Float[Tensor, " T"]
    weight: Float[Tensor, " T"]  # of each token in the loss; 0 = left out
    # Ids and log-probs of the teacher's K likeliest tokens; all items have them, or none.
    likeliest: tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]] | None = None

    @classmethod
    def to_score(cls, encoded: Encoded, tokens: tuple[int, ...]) -> "Item":
        """Return an item that only needs log-probs."""
        nothing = torch.zeros(len(tokens))
        return cls(encoded, tokens, nothing, nothing, nothing)

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.encoded.expanded) + len(self.tokens)

    @property
    def patches(self) -> int:
        """Vision patches of all that its prompt shows."""
        return sum(t * h * w for t, h, w in self.encoded.grids)


@dataclass(frozen=True, slots=True)
class Tree:
    """Responses to one prompt."""

    numbers: tuple[int, ...]  # of their items; empty for the blank image
    ids: Int[Tensor, " W"]
    positions: Int[Tensor, "4 W"]  # text, then mRoPE's time, row and column
    lengths: tuple[int, ...]  # of the prompt, then of each response; W together

    @classmethod
    def blank(cls, image_token: int) -> "Tree":
        """Return a tree of one visual token."""
        return cls((), torch.tensor([image_token]), torch.zeros(4, 1, dtype=torch.long), (1,))

    @classmethod
    def of(cls, items: Sequence[Item], numbers: Sequence[int], prompt: Int[Tensor, "4 P"]) -> "Tree":
        """Return the tree of items that share a prompt with positions [4, P]; responses begin where it ends."""
        responses = [items[i].tokens for i in numbers]
        encoded = items[numbers[0]].encoded
        lengths = (prompt.shape[1], *map(len, responses))
        ids = torch.tensor([*encoded.expanded, *(token for tokens in responses for token in tokens)])
        end = int(prompt[1:].max()) + 1  # mRoPE counts an image's rows and columns, not its tokens
        after = torch.tensor([[prompt.shape[1]], [end], [end], [end]])
        return cls(
            tuple(numbers), ids, torch.cat([prompt, *(after + torch.arange(n) for n in lengths[1:])], 1), lengths
        )

    @property
    def branches(self) -> Int[Tensor, " W"]:
        """[W] 0 for the prompt, k for the k-th response."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))

    @property
    def predictors(self) -> Int[Tensor, " M"]:
        """Index of the token that predicts each response token, in order: the one before it, or the prompt's last."""
        prompt, *responses = self.lengths
        begins = accumulate(self.lengths[:-1])
        last = torch.tensor([prompt - 1])
        return torch.cat(
            [torch.cat([last, torch.arange(b, b + n - 1)])[:n] for b, n in zip(begins, responses, strict=True)]
        )


def grow(items: Sequence[Item], chosen: Sequence[int], limit: int) -> list[list[int]]:
    """Return the numbers of the `chosen` items by tree.

    A tree holds items of one prompt, and is cut where it would exceed `limit` tokens (0: one item per tree) or KEYS.
    """
    found: list[list[int]] = []
    last: dict[str, tuple[list[int], int]] = {}  # key of a prompt -> its newest tree and the tokens of that tree
    for i in chosen:
        key = items[i].encoded.prompt.key
        prompt = len(items[i].encoded.expanded)
        more = len(items[i].tokens)
        tree, tokens = last.get(key, ([], 0))
        keys = (len(tree) + 1) * prompt + tokens + more  # the prompt's own keys, and these again for each response
        if not tree or tokens + more > limit or keys > KEYS * (tokens + more):
            tree = []
            tokens = prompt
            found.append(tree)
        tree.append(i)
        last[key] = (tree, tokens + more)
    return found


def mask(rows: Sequence[Sequence[Tree]], width: int) -> Bool[Tensor, "B 1 W W"]:
    """Return bool [B, 1, W, W], True where a query (third) sees a key (last); a token of padding sees itself."""
    tree = -torch.arange(1, width + 1).repeat(len(rows), 1)
    branch = torch.zeros(len(rows), width, dtype=torch.long)
    for r, row in enumerate(rows):
        end = 0
        for k, one in enumerate(row):
            begin, end = end, end + len(one.ids)
            tree[r, begin:end] = k
            branch[r, begin:end] = one.branches
    same = tree[:, :, None] == tree[:, None, :]
    open_to = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    return (same & open_to & torch.ones(width, width, dtype=torch.bool).tril())[:, None]


def sequences(row: Sequence[Tree]) -> dict[str, Any]:
    """Return the same for flash attention over one row: each prompt and each response is a sequence of queries.

    Returns:
        key_index: the row's tokens that serve as keys, sequence after sequence; the other entries have transformers'
            names. Queries are the last of their keys, as causal masks of flash attention (2.1 and later) have it.
    """
    queries = []
    keys = []
    index = []
    end = 0
    for tree in row:
        prompt = torch.arange(end, end + tree.lengths[0])
        for k, length in enumerate(tree.lengths):
            begin, end = end, end + length
            seen = prompt if k == 0 else torch.cat([prompt, torch.arange(begin, end)])
            queries.append(length)
            keys.append(len(seen))
            index.append(seen)
    bounds = [torch.tensor([0, *accumulate(lengths)], dtype=torch.int32) for lengths in (queries, keys)]
    return {
        "key_index": torch.cat(index),
        "cu_seq_lens_q": bounds[0],
        "cu_seq_lens_k": bounds[1],
        "max_length_q": max(queries),
        "max_length_k": max(keys),
    }


def with_key_index(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Return an attention function of transformers that also takes the output of `sequences`."""

    def attend_by_index(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        key_index: Tensor | None = None,
        **named: Any,
    ) -> Any:
        if key_index is not None:  # [1, heads, W, D] -> [1, heads, keys, D]
            key = key.index_select(2, key_index)
            value = value.index_select(2, key_index)
        return attend(module, query, key, value, *rest, **named)

    return attend_by_index
