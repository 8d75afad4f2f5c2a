"""Packing of long-tailed responses: `python benchmarks/packing.py`, about five minutes.

- budget: 1,024 responses to 64 prompts (log-normal, median 900 tokens, at most 16,384), a third with an image, dealt to 2 and 8
  ranks with the budgets of a recipe; their tokens, of what the micro-batches have room for. All ranks make the same number of micro-steps,
  so that the last one may be half empty: the second column is what whole micro-steps allow at best. Beside it: batches of four responses,
  in the order in which they come, each padded to its longest; tokens, of what is computed.
- balance: the dearest rank of a micro-step, of the mean, by the estimated cost.
- sharing: tokens of all prompts and responses, by those that are computed, for answers of that length and for short ones.
- time: an update of the demo's student on 128 responses of uneven length, to 8 prompts and to 128, packed, and with one padded row for
  each response, in turns.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mmopd.config import Algorithm, Train
from mmopd.demo.world import additions, build_student, digit_sums
from mmopd.modality import Encoder
from mmopd.records import Encoded, Prompt
from mmopd.train import distributed
from mmopd.train.engine import Trainer
from mmopd.train.pack import Cost, Layout, deal
from mmopd.train.tree import Item, grow

BUDGET, PATCHES, LIMIT, RESPONSES, GROUP = 32_768, 32_768, 16_384, 1_024, 16
PROMPT, IMAGE = 200, 1_200  # tokens, patches
ANSWER, SHORT = 900, 100  # tokens
COST = Cost(hidden=4096, patch=0.3)
FOUR = 4  # responses of a padded batch
GOAL = 0.95
TIMES = 5


def step(seed: int, answer: float) -> list[Item]:
    """The responses of a step, of `answer` tokens each in the middle; made of lengths alone."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(RESPONSES // GROUP):
        image = bool(random.random() < 1 / 3)
        prompt = Prompt(f"s/{i}", "t", "image" if image else "text", (), (), "")
        encoded = Encoded(prompt, (), (0,) * (PROMPT + image * IMAGE // 4), ((1, 30, IMAGE // 30),) * image)
        lengths = np.minimum(random.lognormal(np.log(answer), 1.2, GROUP).astype(int) + 1, LIMIT)
        found += [Item.to_score(encoded, (0,) * int(T)) for T in lengths]
    return found


class Found(NamedTuple):
    """Of one step."""

    room: float  # tokens, of what the micro-batches have room for
    best: float  # the same at best
    padded: float  # tokens, of what is computed when padded in order
    dearest: float  # rank, of the mean
    sharing: float  # tokens of all samples, by those computed
    seconds: float  # to deal


def dealt(some: list[Item], ranks: int) -> Found:
    """What `deal` makes of it."""
    begin = time.perf_counter()
    plan = deal(some, ranks, BUDGET, PATCHES, COST)
    took, room, whole = time.perf_counter() - begin, ranks * BUDGET, sum(item.length for item in some)
    sizes = [[[COST.of([some[i] for i in tree]) for tree in grow(some, micro, BUDGET)] for micro in steps] for steps in plan]
    used = sum(size.tokens for steps in sizes for micro in steps for size in micro)
    costs = [[sum(size.cost for size in steps[step]) for steps in sizes] for step in range(len(plan[0]))]
    padded = sum(FOUR * max(item.length for item in some[i : i + FOUR]) for i in range(0, len(some), FOUR))
    dearest = mean(max(row) / mean(row) for row in costs)
    return Found(used / (len(plan[0]) * room), used / (-(-used // room) * room), whole / padded, dearest, whole / used, took)


def items(encoder: Encoder, prompts: int, n: int) -> list[Item]:
    """n responses of uneven length to texts and images of the demo, as many to each."""
    random = np.random.default_rng(0)
    found = []
    for i in (k * prompts // n for k in range(n)):
        row = (digit_sums if i % 3 == 0 else additions)("train", i + 1, 0)[i]
        kind = "image" if row["images"] else "text"
        encoded = encoder.encode(Prompt(f"s/{i}", "t", kind, tuple(row["messages"]), tuple(row["images"]), ""))
        T = int(min(random.lognormal(np.log(40), 1.2) + 1, 600))
        tokens = tuple(random.integers(5, 900, T).tolist())
        found.append(Item(encoded, tokens, torch.full((T,), -7.0), torch.randn(T), torch.full((T,), 1 / T / n)))
    return found


def seconds(trainer: Trainer, some: list[Item]) -> tuple[float, float]:
    """(packed, one padded row each) of an update, medians in turns."""
    times: dict[Layout, list[float]] = {"masked": [], "alone": []}
    for layout in list(times) * (TIMES + 1):
        trainer._collate.layout = layout
        times[layout].append(trainer.update(some)["seconds"])
    packed, alone = (median(taken[1:]) for taken in times.values())
    return packed, alone


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    table = Table(title="Packing: python benchmarks/packing.py", title_justify="left")
    for column in ("", "packed", "at best", "padded", "goal"):
        table.add_column(column, justify="left" if not column else "right")
    for ranks in (2, 8):
        columns = zip(*(dealt(step(seed, ANSWER), ranks) for seed in range(5)), strict=True)
        room, best, padded, dearest, sharing, took = (mean(column) for column in columns)
        short = mean(dealt(step(seed, SHORT), ranks).sharing for seed in range(5))
        table.add_row(f"{ranks} ranks: tokens of the budget", f"{room:.3f}", f"{best:.3f}", f"{padded:.3f}", f">= {GOAL}")
        table.add_row("  dearest rank, of the mean", f"{dearest:.3f}", "1", "", "")
        table.add_row(f"  sharing, answers of {ANSWER} and of {SHORT} tokens", f"{sharing:.2f}, {short:.2f}", "", "1", "")
        table.add_row("  seconds to deal", f"{took:.3f}", "", "", "")
    with tempfile.TemporaryDirectory() as name:
        build_student(name)
        settings = Train(steps=99, dtype="float32", micro_tokens=4096, gradient_checkpointing=False)
        trainer = Trainer(Path(name), encoder := Encoder(Path(name)), settings, Algorithm(), distributed.start(120))
        for prompts in (8, 128):
            packed, alone = seconds(trainer, items(encoder, prompts, 128))
            label = f"update of the demo's student, seconds, {prompts} prompts"
            table.add_row(label, f"{packed:.2f}", "", f"{alone:.2f} = {alone / packed:.1f} x", "")
        distributed.stop()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
