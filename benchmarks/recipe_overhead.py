"""Measure what Uni-OPD adds to a step of plain OPD: `python benchmarks/recipe_overhead.py --run runs/FOLDER`.

It takes less than a minute. Everything that Uni-OPD adds is scalar work on the CPU: weights by difficulty, the online
balance, the margins with their shift or mask, and their metrics. Each part is timed, in CPU time, on arrays of the
shape of a step, with one thread, at two sizes:

- the paper's: 64 prompts x 16 responses of 8,192 tokens on average (8.4 M tokens), 57,000 prompts to weigh. Its step is
  not measured but computed, as a lower bound: the update of 4 B parameters alone, 8 FLOP per parameter and token
  (forward, backward, recomputed forward), on 8 GPUs that reach 40 % of 989 TFLOP/s (H100, bfloat16). Rollouts and
  scoring count as zero time. `--step` sets another value.
- the demo's: the sizes and the median step of a run of `mmopd demo`, from its recipe.yaml and metrics.jsonl. Without
  `--run`, eight steps are run first, in this folder's workspace (a few minutes).

The last rows time the same function, `opd`, as plain OPD and as Uni-OPD, in turns; the difference is the cost of the
parts in place, without the diagnostics, which plain OPD has too. The rollouts that measure difficulty are not included;
they run once for a model and its data.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table

from mmopd import settings_file
from mmopd.algorithm import balance_online, difficulty_weights, margin_mask, margin_shift, opd
from mmopd.algorithm.reverse_kl import _order_seen, _responses_seen
from mmopd.algorithm.settings import Algorithm
from mmopd.config import Recipe
from mmopd.records import Encoded, Outcome, Prompt, Response, Sample, Score
from mmopd.report.metrics import read_lines
from mmopd.train.batch import build_batch
from mmopd.train.recorder import divergence, entropy

GOAL = 0.005
PLAIN = Algorithm(difficulty=None, balance=None, margin=None, visual=None)
FULL = Algorithm(visual=None)
MASK = "margin mask (instead of the two)"


@dataclass(frozen=True)
class Size:
    """A step, and the run that it belongs to."""

    name: str
    prompts: int
    group: int
    length: int  # mean tokens of a response
    weighed: int  # prompts with a difficulty
    steps: int
    seconds: float  # of a step


def paper(seconds: float | None) -> Size:
    """Return the setting of the paper, with a lower bound of its step."""
    update = 8 * 4e9 * 64 * 16 * 8192 / (8 * 0.4 * 989e12)
    return Size("paper", 64, 16, 8192, 57_000, 100, seconds or update)


def demo(run: Path) -> Size:
    """Return the sizes of a run; the median leaves out the first step, in which servers warm up."""
    recipe = settings_file.read(Recipe, run / "recipe.yaml")
    rows = read_lines(run / "metrics.jsonl")
    length = round(sum(row["response_length"] for row in rows) / len(rows))
    return Size(
        "demo",
        recipe.rollout.prompts,
        recipe.rollout.group,
        length,
        600,
        recipe.train.steps,
        median(row["seconds"] for row in rows[1:]),
    )


def run_demo(folder: Path) -> Path:
    """Run eight steps of the demo."""
    settings = ["train.steps=8", "train.checkpoint_every=8", "suite=null"]
    subprocess.run([sys.executable, "-m", "mmopd", "demo", *settings, "--run", str(folder)], check=True)
    return folder


def make_samples(size: Size) -> list[Sample]:
    """Return groups with all shares of right answers.

    A few outcomes are unknown, and lengths range from half to one and a half of the mean.
    """
    random = torch.Generator().manual_seed(0)
    N = size.prompts * size.group
    lengths = torch.randint(size.length // 2, size.length * 3 // 2 + 1, (N,), generator=random).tolist()
    right = (
        torch.rand(N, generator=random) < torch.rand(size.prompts, generator=random).repeat_interleave(size.group)
    ).double()
    right[torch.rand(N, generator=random) < 0.02] = torch.nan
    samples = []
    for i, (T, outcome) in enumerate(zip(lengths, right.tolist(), strict=True)):
        student = torch.empty(T).exponential_(3.0, generator=random).neg()
        teacher = student + 0.3 * torch.randn(T, generator=random)
        response = Response(tuple(range(T)), tuple(student.tolist()), "", "stop", (("step-0", T),))
        samples.append(
            Sample(
                i // size.group, response, Outcome(outcome), Score(f"t{i // size.group % 2}", tuple(teacher.tolist()))
            )
        )
    return samples


def timed(work: Callable[[], object], times: int = 11) -> float:
    """Return milliseconds: the median, after one run that is not counted."""
    spend(work)
    return median(spend(work) for _ in range(times))


def spend(work: Callable[[], object]) -> float:
    """Return milliseconds of CPU: with one thread that is the time it takes, without other work on the machine."""
    begin = time.process_time()
    work()
    return 1000 * (time.process_time() - begin)


def parts(size: Size, samples: list[Sample]) -> dict[str, float]:
    """Return the milliseconds per step of each part."""
    batch = build_batch(samples, FULL, 0)
    outcome = torch.tensor([s.outcome.value for s in samples])
    group = torch.tensor([s.group for s in samples])
    targets = batch.targets
    keep = targets.keep
    assert targets.log_ratio is not None
    assert targets.counted is not None
    returns = targets.log_ratio / targets.counted
    right = torch.randint(0, 9, (size.weighed,), generator=torch.Generator().manual_seed(0))
    encoded = [Encoded(Prompt("s/0", f"task{i % 2}", "text", (), (), ""), (), (), ()) for i in range(size.prompts)]
    response = torch.repeat_interleave(torch.arange(len(samples)), targets.counted)
    R = returns[keep]
    o = outcome[keep]
    g = group[keep]
    shift = margin_shift(R, o, g, scope="group", mode="mean", direction="spread", delta=0.4)
    moved = targets.advantage
    all_shifts = torch.zeros_like(returns).masked_scatter(keep, shift)

    def responses_seen() -> None:
        _responses_seen(outcome, 0.5, returns, scored=keep, balanced=keep, keep=keep, shift=all_shifts)
        for when in ("before", "after"):
            _order_seen(when, R, o, g, margin=FULL.margin, threshold=0.5)

    return {
        "offline weights, once a run": timed(lambda: difficulty_weights(right, 8, cap=4.0)) / size.steps,
        "online balance": timed(
            lambda: balance_online(outcome, group, scope="group", ratio=1.0, tolerance=0.05, seed=1)
        ),
        "margin shift": timed(lambda: margin_shift(R, o, g, scope="group", mode="mean", direction="spread", delta=0.4)),
        "the shift, onto every token": timed(lambda: all_shifts.float().index_select(0, response).add_(moved)),
        MASK: timed(lambda: margin_mask(R, o, g, scope="group", mode="mean", delta=0.4, retain=0.25)),
        "diagnostics: order, margins, shares": timed(responses_seen),
        "diagnostics: reverse KL by task and teacher": timed(lambda: divergence(encoded, batch)),
        "diagnostics: entropy": timed(lambda: entropy(samples)),
    }


def whole(samples: list[Sample], times: int) -> tuple[float, float]:
    """Return (plain OPD, what Uni-OPD takes beyond it) in ms of `opd`.

    Both are medians; the second is over pairs, whose order alternates.
    """
    lengths = torch.tensor([len(s.response.tokens) for s in samples])
    call = partial(
        opd,
        teacher=torch.cat([torch.tensor(s.score.logprobs) for s in samples if isinstance(s.score, Score)]),
        student=torch.cat([torch.tensor(s.response.logprobs) for s in samples]),
        response=torch.repeat_interleave(torch.arange(len(samples)), lengths),
        outcome=torch.tensor([s.outcome.value for s in samples]),
        group=torch.tensor([s.group for s in samples]),
        weight=torch.ones(len(samples)),
        seed=1,
    )
    plain = []
    more = []
    for i in range(times):
        spells = {k: spend(partial(call, settings=(PLAIN, FULL)[k])) for k in ((0, 1) if i % 2 else (1, 0))}
        plain.append(spells[0])
        more.append(spells[1] - spells[0])
    return median(plain[1:]), median(more[1:])


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run folder of `mmopd demo`")
    parser.add_argument("--step", type=float, help="seconds of a step at the paper's size, instead of the estimate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sizes = [paper(args.step), demo(args.run or run_demo(Path(folder) / "run"))]
    found = []
    pairs = []
    for size in sizes:
        samples = make_samples(size)
        found.append(parts(size, samples))
        pairs.append(whole(samples, 15 if size.name == "paper" else 31))
        del samples
    table = Table(title="Time that Uni-OPD adds to a step, one thread", title_justify="left")
    table.add_column("part")
    for size in sizes:
        tokens = size.prompts * size.group * size.length
        for column in (f"{size.name}: ms at {tokens:,} tokens", f"of a step of {size.seconds:.1f} s"):
            table.add_column(column, justify="right")
    table.add_column("goal")

    def add(part: str, times: list[float], goal: str = "") -> None:
        cells = [(f"{ms:.2f}", f"{ms / 1000 / size.seconds:.4%}") for ms, size in zip(times, sizes, strict=True)]
        table.add_row(part, *(cell for pair in cells for cell in pair), goal)

    for part in found[0]:
        add(part, [f[part] for f in found])
    sums = [sum(ms for part, ms in f.items() if part != MASK) for f in found]
    table.add_section()
    add("all of it, with shift", sums, f"<= {GOAL:.1%}")
    add("plain OPD's own: `opd` without the parts", [plain for plain, _ in pairs])
    add("`opd` with the parts takes longer by", [more for _, more in pairs], f"<= {GOAL:.1%}")
    Console(width=170).print(table)
    compared = sums[0] / 1000 / sizes[1].seconds
    tokens = sizes[1].prompts * sizes[1].group * sizes[1].length
    print(f"The first column compared with the demo's step, which has {tokens:,} tokens: {compared:.2%}")
    print(f"python {' '.join(sys.argv)}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
