"""Measure how time and memory grow: `python benchmarks/growth.py`, about three minutes, with one thread.

The exponents are fitted to the logarithms.

- an update of the demo's student on 1,024 to 16,384 tokens in responses of 128: the cost of a larger step;
- the same on one response of 512 to 4,096 tokens: the cost of longer responses, including attention;
- peak memory of the log-prob head, forward and backward, beyond inputs and gradients, on 1,024 tokens with vocabularies
  of 9,496 to 151,936, compared with full logits. Each case has its own process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

import numpy as np
import torch
from peak import peak_mib
from rich.console import Console
from rich.table import Table

from mmopd.algorithm.settings import Algorithm
from mmopd.config import Train
from mmopd.demo.world import additions, build_student
from mmopd.modality import Encoder
from mmopd.records import Prompt
from mmopd.train import distributed
from mmopd.train.logprob import LogprobHead
from mmopd.train.prefix_tree import Item
from mmopd.train.trainer import Trainer

TOKENS = [1024, 2048, 4096, 8192, 16384]
LENGTHS = [512, 1024, 2048, 4096]
VOCABULARIES = [9_496, 18_992, 37_984, 75_968, 151_936]
SHORT = 128  # tokens of a response
TIMES = 3


def exponent(x: list[int], y: list[float]) -> float:
    """Return b of y = a x^b."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def items(encoder: Encoder, n: int, length: int) -> list[Item]:
    """Return n responses, each to its own prompt; prompt and response together have `length` tokens."""
    row = additions("train", 1, 0)[0]
    random = np.random.default_rng(0)
    found = []
    for i in range(n):
        encoded = encoder.encode(Prompt(f"s/{i}", "t", "text", tuple(row["messages"]), (), ""))
        T = length - len(encoded.expanded)
        tokens = tuple(random.integers(5, 900, T).tolist())
        found.append(Item(encoded, tokens, torch.full((T,), -7.0), torch.randn(T), torch.full((T,), 1 / T / n)))
    return found


def seconds(trainer: Trainer, some: list[Item]) -> float:
    """Return the median seconds of an update."""
    return median(trainer.update(some)["seconds"] for _ in range(TIMES))


def peak_of(vocabulary: int, plain: bool) -> float:
    """Return the peak memory of this process in MiB."""
    head = LogprobHead(256, vocabulary, bias=False)
    hidden = torch.randn(1024, 256, requires_grad=True)
    targets = torch.randint(vocabulary, (1024,))
    head(hidden[:8], targets[:8]).sum().backward()  # gradients exist from here on
    mib: list[float] = []
    with peak_mib(mib):
        logprobs = head(hidden).log_softmax(-1).gather(1, targets[:, None]) if plain else head(hidden, targets)
        logprobs.sum().backward()
    return mib[0]


def apart(vocabulary: int, way: str) -> float:
    """Run `peak_of` in another process."""
    command = [sys.executable, __file__, "--peak", str(vocabulary), way]
    return float(
        subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout.split()[-1]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    if (one := parser.parse_args().peak) is not None:
        print(peak_of(int(one[0]), one[1] == "plain"))
        return
    table = Table(title="Growth: python benchmarks/growth.py", title_justify="left")
    for column in ("", "from", "to", "values", "exponent"):
        table.add_column(column, justify="left" if not column else "right")

    def add(label: str, x: list[int], y: list[float], form: str) -> None:
        table.add_row(
            label, f"{x[0]:,}", f"{x[-1]:,}", "  ".join(format(value, form) for value in y), f"{exponent(x, y):.2f}"
        )

    with tempfile.TemporaryDirectory() as name:
        build_student(name)
        ranks = distributed.start(600)
        encoder = Encoder(Path(name))
        settings = Train(steps=99, dtype="float32", micro_tokens=4096, gradient_checkpointing=False)
        trainer = Trainer(Path(name), encoder, settings, Algorithm(), ranks)
        trainer.update(items(encoder, 8, SHORT))
        add(
            "update, seconds by tokens of a step",
            TOKENS,
            [seconds(trainer, items(encoder, n // SHORT, SHORT)) for n in TOKENS],
            ".2f",
        )
        add(
            "update, seconds by tokens of a response",
            LENGTHS,
            [seconds(trainer, items(encoder, 1, n)) for n in LENGTHS],
            ".2f",
        )
        distributed.stop()
    for way, label in (("mmopd", "head, MiB by vocabulary"), ("plain", "full logits, MiB by vocabulary")):
        add(label, VOCABULARIES, [apart(vocabulary, way) for vocabulary in VOCABULARIES], ",.0f")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
