"""Compare a step of the demo with TRL's distillation trainer: `python benchmarks/step.py`, about a quarter of an hour.

Both use the same student and teacher, 16 prompts with an image each x 16 responses per step of at most 24 tokens,
float32, the same learning rate with warm-up, and the same AdamW betas, weight decay and gradient clipping. (TRL 1.16
cannot mix prompts with and without images in one batch, as the demo does: it passes its processor `None` for the
missing image.) TRL generates with transformers and holds student and teacher in one process with two threads; mmopd has
its ranks and vLLM servers, one thread each, on the same two cores. TRL's loss is over the whole vocabulary, mmopd's on
the sampled token. The result is trained tokens per second, after the first two steps.

TRL is not a dependency: `pip install --no-deps --target .mmopd/trl trl==1.16.0` in the workspace, which holds the data
of `mmopd demo`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

import yaml
from rich.console import Console
from rich.table import Table

from mmopd.report.metrics import read_lines

DEMO = Path(".mmopd/demo")
TRL = Path(".mmopd/trl")
TEACHER = "image_teacher"
WARM = 2  # first steps, not counted
GOAL = 2.0
SHARDS = [DEMO / "shards" / "digit_sum"]
WAYS = {
    "mmopd, two ranks and an engine, as the demo is": [],
    "mmopd, two ranks and two engines": ["student.replicas=2"],
    "mmopd, a rank and an engine, rollouts ahead": [
        "train.ranks=1",
        "student.engine.max_num_seqs=256",
        "rollout.async_steps=1",
    ],
}
PLAIN = [
    "mixture=data/demo_image.yaml",
    "suite=null",
    "algorithm={difficulty: null, balance: null, margin: null, visual: null}",
    "train.checkpoint_every=1000",
]


def ours(steps: int, *more: str) -> tuple[float, float]:
    """Return (tokens per second, seconds per step) of mmopd."""
    with tempfile.TemporaryDirectory(dir=".mmopd") as name:
        fleet = Path(name) / "fleet.yaml"
        engine = {
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 64,
            "kv_cache_mib": 64,
            "enforce_eager": True,
        }
        teacher = {"model": str(DEMO / TEACHER), "engine": engine}
        fleet.write_text(
            yaml.safe_dump({"teachers": {TEACHER: teacher}, "routes": [{"teacher": TEACHER}]}), encoding="utf-8"
        )
        run = Path(name) / "run"
        what = ["recipes/demo.yaml", f"fleet={fleet}", *PLAIN, f"train.steps={steps}", *more, "--run", str(run)]
        subprocess.run([sys.executable, "-m", "mmopd", "train", *what], check=True, stdout=subprocess.DEVNULL)
        rows = read_lines(run / "metrics.jsonl")[WARM:]
    seconds = sum(row["seconds"] for row in rows)
    return sum(row["trained_tokens"] for row in rows) / seconds, seconds / len(rows)


def theirs(steps: int, micro: int) -> tuple[float, float, str]:
    """Return the same for TRL, and its version."""
    script = Path(__file__).with_name("step_trl.py")
    command = [sys.executable, str(script), str(DEMO / "base"), str(DEMO / TEACHER), *map(str, SHARDS)]
    env = os.environ | {
        "PYTHONPATH": str(TRL.resolve()),
        "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        [*command, "--steps", str(steps), "--micro", str(micro)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    if done.returncode:
        raise SystemExit(f"TRL ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = found["seconds"][WARM:]
    lengths = found["lengths"][WARM:]
    return 256 * mean(lengths) / mean(seconds), mean(seconds), found["trl"]


def main() -> None:
    """Measure in turns, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    steps = parser.parse_args().steps
    table = Table(title="A step of the demo: python benchmarks/step.py", title_justify="left")
    for column in ("", "tokens/s", "s/step", "of TRL"):
        table.add_column(column, justify="left" if not column else "right")
    *found, version = max(theirs(steps, micro) for micro in (64, 256))
    table.add_row(
        f"TRL {version}, the better of micro-batches of 64 and 256", f"{found[0]:,.0f}", f"{found[1]:.2f}", "1.0 x"
    )
    for label, more in WAYS.items():
        tokens, seconds = ours(steps, *more)
        table.add_row(label, f"{tokens:,.0f}", f"{seconds:.2f}", f"{tokens / found[0]:.2f} x")
    table.add_row("goal", "", "", f">= {GOAL} x")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
