"""Compare a weight sync with a single copy of the weights: `python benchmarks/sync.py`, about a minute.

A student of 176 MiB in bfloat16 is under ZeRO-3 on two ranks, one thread each. Timed on rank 0, the best of five:
gathering all weights by buckets, as every sync does; the same with the buckets written to files in memory, as the
engine on this machine gets them; and one copy of as many bytes, into new memory, as for the files, and into used
memory. Also reported: the peak memory of rank 0 during the transfers above its memory before the first, by the
high-water mark, and the file in memory, which that mark does not include.
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

SCALE = 9
TIMES = 5
RANKS = 2
TRAIN = Train(steps=1, ranks=RANKS, dtype="bfloat16", gradient_checkpointing=False)


def best(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of TIMES runs."""
    times = []
    for _ in range(TIMES):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def rank(model: Path) -> None:
    """Run one rank; rank 0 prints its results."""
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
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.ones(size, dtype=torch.uint8)
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
        f"Peak memory of rank 0 in a transfer: {found['peak']:.0f} MiB more, and {found['file']:.0f} MiB in the file."
    )
    print("Goal: 3 x one copy.")


if __name__ == "__main__":
    main()
