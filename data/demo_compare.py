"""The demo's world and more teachers, for `mmopd compare recipes/compare_demo.yaml`.

The *unreliable* text teacher is sure of itself and wrong wherever the units of an addition sum to a number of
`STUBBORN` (two carries in five are forgotten, always); elsewhere it is as the demo's. The *strong* one is several times
as large as the student, and knows both tasks.

For several teachers of one modality, additions are two tasks: those with a sum of two digits, and those with a sum of
    three. Each has a
teacher that is the demo's in its own half, and as careless as the base in the other one.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mmopd import catalog
from mmopd.demo import pretrain, world
from mmopd.prompts.index import VERSION
from mmopd.runtime.progress import Stage

demo = catalog.load_module(Path(__file__).with_name("demo.py"))

STUBBORN = (10, 13, 16)  # of the sums of units with a carry, 10 to 18
UNRELIABLE = pretrain.Course(rows={"additions": 6000}, split="train", steps=120, lr=1e-3, careless=0.02)
STRONG = pretrain.Course(rows={"additions": 6000, "digit_sum": 6000}, split="train", steps=500, lr=1e-3, careless=0.02)
SCALE = 2
LARGE = 100  # the least sum of a large addition

Kind = Callable[[world.Row], bool]


def prepare(workspace: Path, stage: Stage) -> None:
    """Make what is missing or out of date under `workspace`."""
    root = demo.folder_of(workspace)
    more = [
        (
            "unreliable_teacher",
            (UNRELIABLE, STUBBORN),
            partial(teach, UNRELIABLE, partial(lessons, UNRELIABLE, 1.0, is_stubborn), root / "base", stage),
        ),
        ("strong_untrained", SCALE, partial(world.build_student, scale=SCALE)),
        ("strong_teacher", STRONG, partial(demo.learn, STRONG, root / "strong_untrained", stage)),
    ]
    course, prompts, held_out = demo.TEXT_TEACHER, demo.PROMPTS["additions"], demo.HELD_OUT["additions"]
    for name, task, own, other in (
        ("small", "additions", is_small, is_large),
        ("large", "large_additions", is_large, is_small),
    ):
        more += [
            (
                f"{name}_teacher",
                (course, LARGE),
                partial(teach, course, partial(lessons, course, demo.BASE.careless, other), root / "base", stage),
            ),
            (
                f"shards/{name}_additions",
                (prompts, LARGE, VERSION),
                partial(demo.shards, task, partial(additions, own, "train", prompts), root / "base"),
            ),
            (
                f"heldout/{name}_additions",
                (held_out, LARGE),
                partial(demo.table, partial(additions, own, "heldout", held_out)),
            ),
        ]
    demo.make(root, [*demo.parts(root, stage), *more], stage)


def teach(
    course: pretrain.Course, problems: Callable[[], list[world.Row]], start: Path, stage: Stage, folder: Path
) -> None:
    """Train the model of `start` on the solutions of problems, and write it to `folder`."""
    demo.train(course, start, problems(), stage, folder)


def lessons(course: pretrain.Course, careless: float, where: Kind) -> list[world.Row]:
    """The additions of a course, with solutions that are careless to another degree where a problem is of this kind."""
    (n,) = course.rows.values()
    usual, other = (world.additions(course.split, n, seed=0, careless=share) for share in (course.careless, careless))
    return [b if where(b) else a for a, b in zip(usual, other, strict=True)]


def additions(kind: Kind, split: world.Split, n: int) -> list[world.Row]:
    """`n` additions of a kind (at least a quarter of all are of it)."""
    return [row for row in world.additions(split, 4 * n, seed=0) if kind(row)][:n]


def is_stubborn(row: world.Row) -> bool:
    """Whether the units sum to what the unreliable teacher forgets the carry of: a solution begins with `7+5=12 ...`."""
    return int(row["solution"].partition(" ")[0].partition("=")[2]) in STUBBORN


def is_large(row: world.Row) -> bool:
    """Whether the sum has three digits."""
    return int(row["answer"]) >= LARGE


def is_small(row: world.Row) -> bool:
    """Whether it has two."""
    return not is_large(row)
