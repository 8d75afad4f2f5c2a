"""The demo's world and two more teachers, for `mmopd compare recipes/compare_demo.yaml`.

The *unreliable* text teacher is sure of itself and wrong wherever the units of an addition sum to a number of `STUBBORN` (two carries in
five are forgotten, always); elsewhere it is as the demo's. The *strong* one is several times as large as the student, and knows both tasks.
"""

from functools import partial
from pathlib import Path

from mmopd import catalog
from mmopd.demo import pretrain, world
from mmopd.progress import Stage

demo = catalog.load_module(Path(__file__).with_name("demo.py"))

STUBBORN = (10, 13, 16)  # of the sums of units with a carry, 10 to 18
UNRELIABLE = pretrain.Course(rows={"additions": 6000}, split="train", steps=120, lr=1e-3, careless=0.02)
STRONG = pretrain.Course(rows={"additions": 6000, "digit_sum": 6000}, split="train", steps=500, lr=1e-3, careless=0.02)
SCALE = 2


def prepare(workspace: Path, stage: Stage) -> None:
    """Make what is missing or out of date under `workspace`."""
    root = demo.folder_of(workspace)
    more = [
        ("unreliable_teacher", (UNRELIABLE, STUBBORN), lambda folder: demo.train(UNRELIABLE, root / "base", lessons(), stage, folder)),
        ("strong_untrained", SCALE, partial(world.build_student, scale=SCALE)),
        ("strong_teacher", STRONG, partial(demo.learn, STRONG, root / "strong_untrained", stage)),
    ]
    demo.make(root, [*demo.parts(root, stage), *more], stage)


def lessons() -> list[world.Row]:
    """Of the unreliable teacher: the rows of the demo's text teacher, without the carry where it is stubborn."""
    (n,) = UNRELIABLE.rows.values()
    right, wrong = (world.additions(UNRELIABLE.split, n, seed=0, careless=careless) for careless in (UNRELIABLE.careless, 1.0))
    return [b if units(a) in STUBBORN else a for a, b in zip(right, wrong, strict=True)]


def units(row: world.Row) -> int:
    """Of an addition: what its worked solution begins with, `7+5=12 ...`."""
    return int(row["solution"].partition(" ")[0].partition("=")[2])
