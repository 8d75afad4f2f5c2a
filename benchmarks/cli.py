"""Compare commands that load no model with `mmopd --help`: `python benchmarks/cli.py`.

The commands take turns, so that a busy machine slows all of them alike; five rounds count, after one that fills the
caches. The ratio is of CPU time, in which other programs do not count; wall time is also shown. Byte code is cached in
the benchmark's own folder, as in an installation, whatever PYTHONDONTWRITEBYTECODE says.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mmopd
from mmopd import Prompt, write_shards

ROUNDS = 5
GOALS = {
    "--help": 1.0,
    "show recipes/demo.yaml": 1.3,
    "show mine.yaml": 1.3,
    "plan recipes/mine.yaml": 2.0,
    "doctor": 5.0,
}
MODEL = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "tie_word_embeddings": True,
    "text_config": {"hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728, "num_key_value_heads": 8},
    "vision_config": {"hidden_size": 1024, "depth": 24, "intermediate_size": 4096, "out_hidden_size": 2560},
}
FILES = {
    "mine.yaml": "sources: {a: {shards: shards, task: additions}}",
    "model/config.json": json.dumps(MODEL),
    "teachers/mine.yaml": "teachers: {a: {model: model}}\nroutes: [{teacher: a}]",
    "recipes/mine.yaml": "student: {model: model}\nfleet: teachers/mine.yaml\nmixture: mine.yaml\ntrain: {ranks: 4}",
}


def main() -> None:
    """Print a table; commands that miss their goal are marked."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, text in FILES.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        turn = ({"role": "user", "content": "1 + 2 ="},)
        write_shards([Prompt(f"a/{i}", "additions", "text", turn, (), "3") for i in range(1000)], folder / "shards")
        times: dict[str, list[tuple[float, float]]] = {command: [] for command in GOALS}
        for command in [*GOALS] * (ROUNDS + 1):
            times[command].append(measure(command.split(), folder))
    print(f"{'command':24} {'wall s':>7} {'CPU s':>7} {'ratio':>7} {'goal':>7}")
    base = statistics.median(cpu for _, cpu in times["--help"][1:])
    for command, goal in GOALS.items():
        wall, cpu = (statistics.median(column) for column in zip(*times[command][1:], strict=True))
        missed = "" if cpu / base <= goal else "  above the goal"
        print(f"{command:24} {wall:7.2f} {cpu:7.2f} {cpu / base:7.2f} {goal:7.1f}{missed}")


def measure(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Run a command; return its wall time and its CPU time with that of its children, in seconds."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env |= {"PYTHONPYCACHEPREFIX": str(folder / "pyc"), "PYTHONPATH": str(Path(mmopd.__file__).parents[1])}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "mmopd", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode not in (0, 1):  # 1: something does not fit, or is missing on this machine
        raise SystemExit(f"mmopd {' '.join(arguments)}: {done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
