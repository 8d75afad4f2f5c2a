"""Weights on their way to the engine, beside copying them once: `python benchmarks/sync.py`, about a minute.

A student of 176 MiB in bfloat16 under ZeRO-3 on two ranks, one thread each. Timed on rank 0, the best of five:
gathering all weights by buckets, as every sync does; the same with the buckets written to files in memory, as the
engine on this machine is given them; and one copy of as many bytes, into memory that is new, as that of the files is,
and into memory that has been used. And what rank 0 has at most during the hand-overs beside what it had before the
first: by its high-water mark, and the file in memory, which is not in there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

import torch
from peak import peak_mib
from rich.console import Console
from rich.table import Table

from mmopd.algorithm.settings import Algorithm
from mmopd.config import Train
from mmopd.demo.world import build_student
from mmopd.modality import Encoder
from mmopd.rollout.buckets import MemoryFile, filled
from mmopd.rollout.sync import BUCKET_BYTES
from mmopd.runtime.network import free_port
from mmopd.train import distributed
from mmopd.train.trainer import Trainer

SCALE, TIMES, RANKS = 9, 5, 2
TRAIN = Train(steps=1, ranks=RANKS, dtype="bfloat16", gradient_checkpointing=False)


def best(work: Callable[[], object]) -> float:
    """Seconds."""
    times = []
    for _ in range(TIMES):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def rank(model: Path) -> None:
    """One rank; number 0 prints what it has found."""
    torch.set_num_threads(1)
    ranks = distributed.start(120)
    trainer = Trainer(model, Encoder(model), TRAIN, Algorithm(), ranks)

    def gather() -> None:
        for _ in trainer.named_weights():
            pass

    def hand_over() -> None:
        for file in filled(trainer.named_weights(), BUCKET_BYTES, MemoryFile):
            sizes.append(Path(file.finish()).stat().st_size)

    size = sum(p.ds_numel * p.element_size() for p in trainer.student.parameters())
    mib: list[float] = []
    sizes: list[int] = []
    with peak_mib(mib):
        files = best(hand_over)
    found = {
        "bytes": size,
        "peak": mib[0],
        "file": max(sizes, default=0) / 2**20,
        "files": files,
        "gather": best(gather),
    }
    source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
    found |= {
        "new": best(lambda: torch.empty(size, dtype=torch.uint8).copy_(source)),
        "used": best(lambda: target.copy_(source)),
    }
    if ranks.rank == 0:
        print(json.dumps(found))
    distributed.stop()


def main() -> None:
    """Build a student, run the ranks, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    if (model := parser.parse_args().rank_of) is not None:
        rank(model)
        return
    with tempfile.TemporaryDirectory() as name:
        build_student(name, scale=SCALE)
        env = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(RANKS),
        }
        command = [sys.executable, __file__, "--rank-of", name]
        running = [
            subprocess.Popen(
                command,
                env=env | {"RANK": str(n), "LOCAL_RANK": str(n)},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            for n in range(RANKS)
        ]
        outputs = [process.communicate()[0] for process in running]
    found = json.loads(outputs[0].splitlines()[-1])
    table = Table(
        title=f"{found['bytes'] / 2**20:.0f} MiB over {RANKS} ranks: python benchmarks/sync.py", title_justify="left"
    )
    for column in ("", "seconds", "of a copy into new memory", "of one into used memory"):
        table.add_column(column, justify="left" if not column else "right")
    names = {
        "gather": "gathered by buckets",
        "files": "and written for the engine",
        "new": "one copy into new memory",
        "used": "used memory",
    }
    for key, label in names.items():
        table.add_row(
            label, f"{found[key]:.3f}", f"{found[key] / found['new']:.1f} x", f"{found[key] / found['used']:.1f} x"
        )
    Console(width=120).print(table)
    print(
        f"Memory of rank 0 during a hand-over, at its peak: {found['peak']:.0f} MiB more, and {found['file']:.0f} MiB in the file."
    )
    print("Goal: 3 x one copy.")


if __name__ == "__main__":
    main()
