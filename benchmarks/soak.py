"""Check that a long run does not use more and more resources: `python benchmarks/soak.py`, about half an hour.

It makes 2,000 steps of the demo. During a run of small steps, all processes that it started are inspected every ten
seconds: resident memory (shared memory counts once), open files, processes, threads and listening ports. After the
first tenth of the run each should stay constant. The means of the second and the last tenth are printed, with the
growth between them, and plotted as soak.png in the run's folder.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

import psutil
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from mmopd.report.metrics import read_lines

EVERY = 10.0
SMALL = [
    "suite=null",
    "algorithm.difficulty=null",
    "rollout.prompts=8",
    "rollout.group=8",
    "train.checkpoint_every=100",
]


def look(root: psutil.Process) -> dict[str, float]:
    """Return the resources of a process and all its descendants."""
    seen = {"memory, MiB": 0.0, "files": 0.0, "processes": 0.0, "threads": 0.0, "ports": 0.0}
    for process in [root, *root.children(recursive=True)]:
        try:
            seen["memory, MiB"] += process.memory_full_info().pss / 2**20
            seen["files"] += process.num_fds()
            seen["threads"] += process.num_threads()
            seen["ports"] += sum(c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp4"))
            seen["processes"] += 1
        except psutil.NoSuchProcess:
            continue
    return seen


def main() -> None:
    """Run, inspect, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--run", type=Path, default=Path("runs/soak"))
    given = parser.parse_args()
    what = ["recipes/demo.yaml", *SMALL, f"train.steps={given.steps}", "--run", str(given.run)]
    given.run.parent.mkdir(parents=True, exist_ok=True)  # for the log; a new run makes its own folder
    begin = time.monotonic()
    found = []
    with (given.run.parent / f"{given.run.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmopd", "train", *what], stdout=log, stderr=subprocess.STDOUT
        )
        root = psutil.Process(process.pid)
        while process.poll() is None:
            steps = read_lines(given.run / "metrics.jsonl")
            if steps and steps[-1]["step"] + 1 < given.steps:  # after the last step everything ends
                found.append({"step": steps[-1]["step"], **look(root)})
            time.sleep(EVERY)
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode}: {log.name}")
    tenth = given.steps / 10
    early = [row for row in found if tenth <= row["step"] < 2 * tenth]
    late = [row for row in found if row["step"] >= given.steps - tenth]
    table = Table(
        title=f"{given.steps:,} steps in {(time.monotonic() - begin) / 60:.0f} minutes: python benchmarks/soak.py"
    )
    for column in ("", "second tenth", "last tenth", "growth"):
        table.add_column(column, justify="left" if not column else "right")
    names = [name for name in found[0] if name != "step"]
    figure = Figure(figsize=(8, 1.6 * len(names)), layout="constrained")
    for axes, name in zip(figure.subplots(len(names), 1, sharex=True), names, strict=True):
        before, after = (mean(row[name] for row in part) for part in (early, late))
        table.add_row(name, f"{before:,.1f}", f"{after:,.1f}", f"{after / before - 1:+.2%}")
        axes.plot([row["step"] for row in found], [row[name] for row in found], color="#1b3a57", linewidth=1)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].set_xlabel("step")
    figure.savefig(given.run / "soak.png", dpi=120)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
