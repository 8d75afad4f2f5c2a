"""The demo world and more teachers, for `mmopd compare recipes/compare_demo.yaml`.

The *unreliable* text teacher is sure of itself, and wrong wherever the units of an addition sum to a number of
`STUBBORN` (it always forgets these carries, two in five). Elsewhere it is as good as the demo's text teacher. The
*strong* teacher is several times as large as the student, and knows both tasks.

For several teachers of one modality, the additions are split into two tasks: sums of two digits, and sums of three.
Each task has a teacher that equals the demo's on its own task, and is as careless as the base on the other one.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mmopd import catalog
from mmopd.demo import pretrain, world
from mmopd.prompts.index import VERSION
from mmopd.runtime.progress import Stage

demo = catalog.load_module(Path(__file__).with_name("demo.py"))

STUBBORN = (10, 13, 16)  # out of the sums of units that carry, 10 to 18
UNRELIABLE = pretrain.Course(rows={"additions": 6000}, split="train", steps=120, lr=1e-3, careless=0.02)
STRONG = pretrain.Course(rows={"additions": 6000, "digit_sum": 6000}, split="train", steps=500, lr=1e-3, careless=0.02)
SCALE = 2
LARGE = 100  # the smallest sum of a large addition

Kind = Callable[[world.Row], bool]


def prepare(workspace: Path, stage: Stage) -> None:
    """Make the parts that are missing or out of date under `workspace`."""
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
    course = demo.TEXT_TEACHER
    prompts = demo.PROMPTS["additions"]
    held_out = demo.HELD_OUT["additions"]
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
    """Return the additions of a course; where `where` is true, solutions have the other share of `careless` steps."""
    (n,) = course.rows.values()
    usual, other = (world.additions(course.split, n, seed=0, careless=share) for share in (course.careless, careless))
    return [b if where(b) else a for a, b in zip(usual, other, strict=True)]


def additions(kind: Kind, split: world.Split, n: int) -> list[world.Row]:
    """Return `n` additions of a kind (at least a quarter of all additions must be of it)."""
    return [row for row in world.additions(split, 4 * n, seed=0) if kind(row)][:n]


def is_stubborn(row: world.Row) -> bool:
    """Return True if the unreliable teacher forgets the carry; a solution begins with the units, `7+5=12 ...`."""
    return int(row["solution"].partition(" ")[0].partition("=")[2]) in STUBBORN


def is_large(row: world.Row) -> bool:
    """Return True if the sum has three digits."""
    return int(row["answer"]) >= LARGE


def is_small(row: world.Row) -> bool:
    """Return True if the sum has two digits."""
    return not is_large(row)
