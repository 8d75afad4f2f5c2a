"""Compare ways to compute log-probs of sampled tokens: `python benchmarks/logprob.py`, about two minutes.

The head of a Qwen (V = 151,936) runs forward and backward on 4,096 tokens of hidden size 256, with one thread. The
trainer's head is compared with plain logits, log-softmax and gather, with the same in chunks under torch's checkpoint,
and with torch's own `linear_cross_entropy`. Each has its own process; memory is the peak above inputs and their
gradients. The last column is the largest difference from float64 on 64 tokens. With `--dtype bfloat16` head and hidden
states are as in training on GPUs; log-probs must still be float32.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from peak import peak_mib
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear_cross_entropy
from torch.utils.checkpoint import checkpoint

from mmopd.train.logprob import LogprobHead

V = 151_936
TOKENS = 4096
HIDDEN = 256
WAYS = {
    "mmopd": "mmopd",
    "naive": "logits, log-softmax, gather",
    "chunks": "the same, 512 tokens at a time",
    "torch": "linear_cross_entropy",
}


def naive(hidden: Tensor, head: LogprobHead, targets: Tensor) -> Tensor:
    """Compute all logits in one piece."""
    return head(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def chunks(hidden: Tensor, head: LogprobHead, targets: Tensor) -> Tensor:
    """Compute the logits of 512 tokens at a time, and again in the backward pass."""
    some = zip(hidden.split(512), targets.split(512), strict=True)
    return torch.cat([checkpoint(naive, rows, head, ids, use_reentrant=False) for rows, ids in some])


def of_torch(hidden: Tensor, head: LogprobHead, targets: Tensor) -> Tensor:
    """Call torch 2.13's function; with its own choice of chunk size it takes seven times as long."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
    return -linear_cross_entropy(hidden, head.weight, targets, reduction="none", options=options)


FUNCTIONS: dict[str, Callable[[Tensor, LogprobHead, Tensor], Tensor]] = {
    "mmopd": lambda hidden, head, targets: head(hidden, targets),
    "naive": naive,
    "chunks": chunks,
    "torch": of_torch,
}


def one(way: str, dtype: torch.dtype) -> dict[str, float]:
    """Return seconds, MiB and largest error of one way, in this process."""
    torch.manual_seed(0)
    head = LogprobHead(HIDDEN, V, bias=False, dtype=dtype)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (TOKENS,))
    warm = FUNCTIONS[way](hidden[:8], head, targets[:8])
    warm.sum().backward()  # gradients of head and hidden exist from here on
    mib: list[float] = []
    with peak_mib(mib):
        begin = time.perf_counter()
        logprobs = FUNCTIONS[way](hidden, head, targets)
        (logprobs * torch.linspace(-1, 1, TOKENS)).sum().backward()
        seconds = time.perf_counter() - begin
    exact = naive(hidden[:64].double(), head.double(), targets[:64])
    return {"seconds": seconds, "mib": mib[0], "error": float((logprobs[:64].double() - exact).detach().abs().max())}


def main() -> None:
    """Measure each way in turn, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    settings = parser.parse_args()
    if settings.one:
        print(json.dumps(one(settings.one, getattr(torch, settings.dtype))))
        return
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--one", way, "--dtype", settings.dtype]
        found[way] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout.splitlines()[
                -1
            ]
        )
    title = f"Log-probs of {TOKENS:,} tokens, V = {V:,}, {settings.dtype}: python benchmarks/logprob.py"
    table = Table(title=title, title_justify="left")
    for column in ("", "MiB", "of naive", "seconds", "of naive", "error, nats"):
        table.add_column(column, justify="left" if not column else "right")
    for way, label in WAYS.items():
        mib, seconds = (found[way][key] / found["naive"][key] for key in ("mib", "seconds"))
        values = [f"{found[way]['mib']:,.0f}", f"1/{1 / mib:.1f}", f"{found[way]['seconds']:.1f}", f"{seconds:.2f}"]
        table.add_row(label, *values, f"{found[way]['error']:.1e}")
    table.add_row("goal, of mmopd", "", "1/13", "", "0.50", "")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
