"""Packing of long-tailed responses: `python benchmarks/packing.py`, about two minutes.

- budget: lengths of 1,024 responses (log-normal, median 900 tokens, some at the limit of 16,384), a third with an image, dealt to 2 and 8
  ranks with the budgets of a recipe; their tokens, of what the micro-batches have room for. All ranks make the same number of micro-steps,
  so that the last one may be half empty: the second column is what whole micro-steps allow at best. Beside it: batches of four responses,
  in the order in which they come, each padded to its longest; tokens, of what is computed.
- balance: the dearest rank of a micro-step, of the mean, by the estimated cost.
- time: an update of the demo's student on 128 responses, packed, and with one padded row for each response, in turns.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import mean, median

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mmopd.config import Algorithm, Train
from mmopd.demo.world import additions, build_student, digit_sums
from mmopd.modality import Encoder
from mmopd.records import Prompt
from mmopd.train import distributed
from mmopd.train.engine import Trainer
from mmopd.train.pack import Size, assign
from mmopd.train.tree import Item

BUDGET, PATCHES, LIMIT, RESPONSES = 32_768, 32_768, 16_384, 1_024
PROMPT, IMAGE = 200, 1_200  # tokens, patches
FOUR = 4  # responses of a padded batch
GOAL = 0.95
TIMES = 5


def sizes(seed: int) -> list[Size]:
    """Of the responses of a step, prompts included."""
    random = np.random.default_rng(seed)
    lengths = np.minimum(random.lognormal(np.log(900), 1.2, RESPONSES).astype(int) + 1, LIMIT) + PROMPT
    patches = np.where(random.random(RESPONSES) < 1 / 3, IMAGE, 0)
    return [Size(float(t) * (1 + t / 50_000) + 0.3 * p, int(t), int(p)) for t, p in zip(lengths, patches, strict=True)]


def used(some: list[Size], ranks: int) -> tuple[float, float, float, float]:
    """(tokens of room, at best, tokens of computed when padded in order, dearest rank of the mean)."""
    plan = assign(some, ranks, BUDGET, PATCHES)
    steps = len(plan[0])
    costs = [[sum(some[i].cost for i in plan[rank][step]) for rank in range(ranks)] for step in range(steps)]
    tokens = sum(size.tokens for size in some)
    room = ranks * BUDGET
    padded = sum(FOUR * max(size.tokens for size in some[i : i + FOUR]) for i in range(0, len(some), FOUR))
    return tokens / (steps * room), tokens / (-(-tokens // room) * room), tokens / padded, mean(max(row) / mean(row) for row in costs)


def items(encoder: Encoder, n: int) -> list[Item]:
    """Responses of uneven length to texts and images of the demo."""
    random = np.random.default_rng(0)
    found = []
    for i in range(n):
        row = (digit_sums if i % 3 == 0 else additions)("train", i + 1, 0)[i]
        kind = "image" if row["images"] else "text"
        encoded = encoder.encode(Prompt(f"s/{i}", "t", kind, tuple(row["messages"]), tuple(row["images"]), ""))
        T = int(min(random.lognormal(np.log(40), 1.2) + 1, 600))
        tokens = tuple(random.integers(5, 900, T).tolist())
        found.append(Item(encoded, tokens, torch.full((T,), -7.0), torch.randn(T), torch.full((T,), 1 / T / n)))
    return found


def seconds(folder: Path) -> tuple[float, float]:
    """(packed, one padded row each) of an update, medians in turns."""
    ranks = distributed.start(120)
    settings = Train(steps=99, dtype="float32", micro_tokens=4096, gradient_checkpointing=False)
    trainer = Trainer(folder, encoder := Encoder(folder), settings, Algorithm(), ranks)
    some, times = items(encoder, 128), ([], [])
    for turn in range(2 * TIMES + 2):
        trainer._collate.alone = bool(turn % 2)
        taken = trainer.update(some)["seconds"]
        if turn >= 2:
            times[turn % 2].append(taken)
    distributed.stop()
    return median(times[0]), median(times[1])


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table = Table(title="Packing: python benchmarks/packing.py", title_justify="left")
    for column in ("", "packed", "at best", "padded", "goal"):
        table.add_column(column, justify="left" if not column else "right")
    for ranks in (2, 8):
        begin = time.perf_counter()
        found = [used(sizes(seed), ranks) for seed in range(5)]
        took = (time.perf_counter() - begin) / 5
        room, best, padded, balance = (mean(column) for column in zip(*found, strict=True))
        table.add_row(f"{ranks} ranks: tokens of the budget", f"{room:.3f}", f"{best:.3f}", f"{padded:.3f}", f">= {GOAL}")
        table.add_row("  dearest rank, of the mean", f"{balance:.3f}", "1", "", "")
        table.add_row("  seconds to deal", f"{took:.3f}", "", "", "")
    with tempfile.TemporaryDirectory() as name:
        build_student(name)
        packed, alone = seconds(Path(name))
    table.add_row("update of the demo's student, seconds", f"{packed:.2f}", "", f"{alone:.2f} = {alone / packed:.1f} x", "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
