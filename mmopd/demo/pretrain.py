"""Supervised training of the demo's models: the base student, and the teachers that continue from it.

One process, plain transformers, full-length sequences of a few dozen tokens. A base that is trained to the end on
little data is *weak but sure of itself*. Stopping early gives a base that no on-policy method can improve, because its
samples are noise.
"""

import io
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    get_cosine_schedule_with_warmup,
)

from mmopd.demo.world import Row, Split
from mmopd.model_folder import load_processor

IGNORED = -100  # transformers' own mark for a position without a loss
Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Course:
    """The training data of a model, and how long it is trained."""

    rows: Mapping[str, int]  # number of rows of each task
    split: Split
    steps: int
    lr: float
    careless: float = 0.0  # share of the hard steps of the solutions that are wrong


@dataclass(frozen=True)
class Example:
    """One tokenized row: prompt and solution, with the patches of its images."""

    ids: Tensor  # [T] int
    labels: Tensor  # [T] int, IGNORED on the prompt
    patches: Tensor | None  # [patches, channels * temporal * patch * patch]
    grid: Tensor | None  # [I, 3]


def train(
    folder_in: str | Path,
    folder_out: str | Path,
    rows: Sequence[Row],
    *,
    steps: int,
    lr: float = 2e-3,
    batch: int = 64,
    seed: int = 0,
    weight_decay: float = 0.01,
    progress: Progress = lambda step, loss: None,
) -> None:
    """Train the checkpoint in `folder_in` on the rows' solutions and write the result to `folder_out`.

    AdamW with a short warm-up and a cosine to zero. Rows are reshuffled every epoch.

    Args:
        progress: called after each step with the number of steps done and the loss (nats per token).
    """
    if not rows:
        raise ValueError("no rows to train on")
    torch.manual_seed(seed)
    processor = load_processor(Path(folder_in))
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder_in, dtype=torch.float32).train()
    examples = [encode(row, processor) for row in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(20, steps // 10), steps)
    batches = _batches(len(examples), batch, seed)
    for step in range(steps):
        loss = _loss(model, [examples[i] for i in next(batches)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress(step + 1, float(loss.detach()))
    model.save_pretrained(folder_out)
    processor.save_pretrained(folder_out)


def encode(row: Row, processor: Qwen3VLProcessor) -> Example:
    """Tokenize a row as `prompt + solution + <|im_end|>`, with a loss on everything after the prompt."""
    prompt = processor.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
    images = [Image.open(io.BytesIO(image)) for image in row["images"]]
    inputs = processor(text=[prompt], images=images or None, return_tensors="pt")
    solution = processor.tokenizer(row["solution"] + "<|im_end|>", return_tensors="pt")["input_ids"][0]
    return Example(
        ids=torch.cat([inputs["input_ids"][0], solution]),
        labels=torch.cat([torch.full_like(inputs["input_ids"][0], IGNORED), solution]),
        patches=inputs.get("pixel_values"),
        grid=inputs.get("image_grid_thw"),
    )


def _batches(rows: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Yield endless batches of row numbers, in a new order every epoch; an epoch may end inside a batch."""
    rng = random.Random(seed)
    queue: list[int] = []
    while True:
        while len(queue) < batch:
            queue += rng.sample(range(rows), rows)
        yield queue[:batch]
        del queue[:batch]


def _loss(model: Qwen3VLForConditionalGeneration, examples: Sequence[Example]) -> Tensor:
    """Return the mean cross-entropy over the solutions' tokens (right padding, which a causal model does not see)."""
    ids = pad_sequence([e.ids for e in examples], batch_first=True)
    patches = [e.patches for e in examples if e.patches is not None]
    grids = [e.grid for e in examples if e.grid is not None]
    loss: Tensor = model(
        input_ids=ids,
        attention_mask=pad_sequence([torch.ones_like(e.ids) for e in examples], batch_first=True),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=torch.cat(patches) if patches else None,
        image_grid_thw=torch.cat(grids) if grids else None,
        labels=pad_sequence([e.labels for e in examples], batch_first=True, padding_value=IGNORED),
        use_cache=False,
    ).loss
    return loss
