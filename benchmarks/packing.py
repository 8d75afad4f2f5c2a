"""Measure packing of long-tailed responses: `python benchmarks/packing.py`, about five minutes.

With `--no-update` it takes half a minute.

- budget: 1,024 responses to 64 prompts (log-normal, median 900 tokens, at most 16,384), a third with an image, are
  dealt to 2 and 8 ranks with the recipes' budget of 16,384 tokens and with twice as many. Reported is the share of the
  budget that tokens fill. All ranks make the same number of micro-steps, so the last one may be half empty: the second
  column is the best possible with whole micro-steps. For comparison: batches of four responses, in order of arrival,
  each padded to its longest, with the share of computed tokens that are not padding.
- balance: cost of the most expensive rank compared with the mean, by the estimate: for a micro-step, where ranks wait
  for each other, and for the whole step. For comparison: Karmarkar-Karp on the same pieces for the whole step, without
  budgets and micro-steps.
- sharing: tokens of all prompts and responses / computed tokens, for answers of that length and for short ones.
- time: an update of the demo's student on 128 responses of uneven length, to 8 prompts and to 128, packed, and with one
  padded row per response, in turns.
"""

import argparse
import heapq
import itertools
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

from mmopd.algorithm.settings import Algorithm
from mmopd.config import Train
from mmopd.demo.world import additions, build_student, digit_sums
from mmopd.modality import Encoder
from mmopd.records import Encoded, Prompt
from mmopd.train import distributed
from mmopd.train.pack import Cost, Layout, deal
from mmopd.train.prefix_tree import Item, grow
from mmopd.train.trainer import Trainer

BUDGETS = (16_384, 32_768)  # tokens, and as many patches
LIMIT = 16_384  # tokens of a response
RESPONSES = 1_024
GROUP = 16
PROMPT = 200  # tokens
IMAGE = 1_200  # patches
ANSWER = 900  # tokens, median
SHORT = 100
COST = Cost(hidden=4096, patch=0.3)
FOUR = 4  # responses of a padded batch
GOAL = 0.95
TIMES = 5


def step(seed: int, answer: float) -> list[Item]:
    """Return the responses of a step with a median of `answer` tokens each, made from lengths alone."""
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
    """Results of one step."""

    room: float  # share of the budget that tokens fill
    best: float  # its maximum
    padded: float  # share of computed tokens that are not padding, in padded batches
    dearest: float  # most expensive rank of a micro-step / mean
    whole: float  # the same for the step
    differencing: float  # the same by Karmarkar-Karp
    sharing: float  # tokens of all samples / computed tokens
    seconds: float  # to deal


def karmarkar_karp(costs: list[float], ranks: int) -> list[float]:
    """Return the sums of the ranks by the differencing method.

    It joins the two least even partial assignments: expensive ranks of one get the cheap ones of the other.
    """
    heap = [(-cost, i, (*[0.0] * (ranks - 1), cost)) for i, cost in enumerate(costs)]
    heapq.heapify(heap)
    while len(heap) > 1:
        _, i, a = heapq.heappop(heap)
        _, _, b = heapq.heappop(heap)
        sums = tuple(sorted(x + y for x, y in zip(a, reversed(b), strict=True)))
        heapq.heappush(heap, (sums[0] - sums[-1], i, sums))
    return list(heap[0][2])


def dealt(some: list[Item], ranks: int, budget: int) -> Found:
    """Return what `deal` achieves."""
    begin = time.perf_counter()
    plan = deal(some, ranks, budget, budget, COST)
    took = time.perf_counter() - begin
    room = ranks * budget
    whole = sum(item.length for item in some)
    sizes = [
        [[COST.of([some[i] for i in tree]) for tree in grow(some, micro, budget)] for micro in steps] for steps in plan
    ]
    used = sum(size.tokens for steps in sizes for micro in steps for size in micro)
    costs = [[sum(size.cost for size in steps[step]) for steps in sizes] for step in range(len(plan[0]))]
    padded = sum(FOUR * max(item.length for item in some[i : i + FOUR]) for i in range(0, len(some), FOUR))
    dearest = mean(max(row) / mean(row) for row in costs)
    ours = [sum(column) for column in zip(*costs, strict=True)]
    theirs = karmarkar_karp([size.cost for steps in sizes for micro in steps for size in micro], ranks)
    over = (max(sums) / mean(sums) for sums in (ours, theirs))
    return Found(
        used / (len(plan[0]) * room),
        used / (-(-used // room) * room),
        whole / padded,
        dearest,
        *over,
        whole / used,
        took,
    )


def items(encoder: Encoder, prompts: int, n: int) -> list[Item]:
    """Return n responses of uneven length to texts and images of the demo, equally many for each prompt."""
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
    """Return median seconds of an update (packed, one padded row each), measured in turns."""
    times: dict[Layout, list[float]] = {"masked": [], "alone": []}
    for layout in list(times) * (TIMES + 1):
        trainer._collate.layout = layout
        times[layout].append(trainer.update(some)["seconds"])
    packed, alone = (median(taken[1:]) for taken in times.values())
    return packed, alone


def updates(table: Table) -> None:
    """Measure updates of the demo's student, and add them to the table."""
    with tempfile.TemporaryDirectory() as name:
        build_student(name)
        settings = Train(steps=99, dtype="float32", micro_tokens=4096, gradient_checkpointing=False)
        trainer = Trainer(Path(name), encoder := Encoder(Path(name)), settings, Algorithm(), distributed.start(120))
        for prompts in (8, 128):
            packed, alone = seconds(trainer, items(encoder, prompts, 128))
            label = f"update of the demo's student, seconds, {prompts} prompts"
            table.add_row(label, f"{packed:.2f}", "", f"{alone:.2f} = {alone / packed:.1f} x", "")
        distributed.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-update", action="store_true", help="only deal, without training")
    given = parser.parse_args()
    table = Table(title="Packing: python benchmarks/packing.py", title_justify="left")
    for column in ("", "packed", "at best", "padded", "goal"):
        table.add_column(column, justify="left" if not column else "right")
    for budget, ranks in itertools.product(BUDGETS, (2, 8)):
        found = Found(
            *(
                mean(column)
                for column in zip(*(dealt(step(seed, ANSWER), ranks, budget) for seed in range(5)), strict=True)
            )
        )
        short = mean(dealt(step(seed, SHORT), ranks, budget).sharing for seed in range(5))
        label = f"{ranks} ranks: tokens of the budget of {budget:,}"
        table.add_row(label, f"{found.room:.3f}", f"{found.best:.3f}", f"{found.padded:.3f}", f">= {GOAL}")
        table.add_row("  most expensive rank of a micro-step / mean", f"{found.dearest:.3f}", "1", "", "")
        table.add_row(
            "  most expensive rank of the step / mean; by Karmarkar-Karp",
            f"{found.whole:.5f}; {found.differencing:.5f}",
            "1",
            "",
            "",
        )
        table.add_row(
            f"  sharing, answers of {ANSWER} and of {SHORT} tokens", f"{found.sharing:.2f}, {short:.2f}", "", "1", ""
        )
        table.add_row("  seconds to deal", f"{found.seconds:.3f}", "", "", "")
    if not given.no_update:
        updates(table)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
