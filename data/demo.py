"""The demo world, made on this machine: a base student, two teachers that continue from it, shards, held-out tables.

A recipe calls `prepare(workspace, stage)` by `prepare: data/demo.py`. Each part goes to `.mmopd/demo/`. It is made
again only if its inputs have changed: the settings below, the code that makes it, or the parts before it.
"""

import hashlib
import inspect
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers.utils import logging

from mmopd.demo import pretrain, world
from mmopd.prompts import TokenCounter, write_shards
from mmopd.prompts.index import VERSION
from mmopd.records import Prompt
from mmopd.runtime.progress import Stage

PROMPTS = {"additions": 300, "digit_sum": 300}  # prompts for distillation
HELD_OUT = {"additions": 300, "digit_sum": 300}  # rows for evaluation
# The base sees few scans, few additions and careless solutions, and is trained to the end: it is weak and sure of
# itself, but has seen right solutions. A base that is stopped early samples noise, and one that never saw a right
# solution does not find it; neither can be improved on-policy.
BASE = pretrain.Course(rows={"additions": 3000, "digit_sum": 3000}, split="few", steps=300, lr=2e-3, careless=0.75)
# A teacher that never errs gives a wrong token a probability below e^-10, and the objective leaves such tokens out.
# This teacher therefore errs now and then.
TEXT_TEACHER = pretrain.Course(rows={"additions": 6000}, split="train", steps=120, lr=1e-3, careless=0.02)
IMAGE_TEACHER = pretrain.Course(rows={"digit_sum": 6000}, split="train", steps=250, lr=1e-3)

# Stages of `mmopd demo` on two cores with nothing else to do; from these the time left is estimated.
USUAL_SECONDS = {
    "prepare": 160,
    "serve": 18,
    "preflight": 2,
    "difficulty": 18,
    "evaluate base, text_teacher, image_teacher": 16,
    "distil": 150,
    "evaluate distilled": 6,
    "report": 2,
}

Make = Callable[[Path], None]
Problems = Callable[[], list[world.Row]]


def prepare(workspace: Path, stage: Stage) -> None:
    """Make the parts that are missing or out of date under `workspace`."""
    root = folder_of(workspace)
    make(root, parts(root, stage), stage)


def folder_of(workspace: Path) -> Path:
    """Return the folder of the demo world."""
    return workspace / ".mmopd" / "demo"


def parts(root: Path, stage: Stage) -> list[tuple[str, object, Make]]:
    """List all parts: (name, what it is made from apart from the earlier parts, function that makes it)."""
    return [
        ("untrained", "", world.build_student),
        ("base", BASE, partial(learn, BASE, root / "untrained", stage)),
        ("text_teacher", TEXT_TEACHER, partial(learn, TEXT_TEACHER, root / "base", stage)),
        ("image_teacher", IMAGE_TEACHER, partial(learn, IMAGE_TEACHER, root / "base", stage)),
        *(
            (f"shards/{task}", (n, VERSION), partial(shards, task, partial(rows_of, task, "train", n), root / "base"))
            for task, n in PROMPTS.items()
        ),
        *((f"heldout/{task}", n, partial(table, partial(rows_of, task, "heldout", n))) for task, n in HELD_OUT.items()),
    ]


def make(root: Path, parts: list[tuple[str, object, Make]], stage: Stage) -> None:
    """Make the parts that are missing or out of date."""
    logging.disable_progress_bar()  # of transformers; `stage` shows the progress of the whole
    key = inspect.getsource(world) + inspect.getsource(pretrain)
    todo: list[tuple[Path, str, object, Make]] = []
    for name, made_from, how in parts:
        key = hashlib.sha256(repr((key, name, made_from)).encode()).hexdigest()  # covers all earlier parts too
        if not _is_made(root / name, key):
            todo.append((root / name, key, made_from, how))
    stage.total(sum(map(_steps, (made_from for _, _, made_from, _ in todo))))
    for folder, key, _, how in todo:
        _make(folder, key, how)
    stage.outcome = f"{len(todo)} parts made" if todo else f"cached in {root.relative_to(root.parents[1])}"


def _steps(made_from: object) -> int:
    """Return the number of training steps in what a part is made from: a course, or a tuple that may begin with one."""
    course = made_from[0] if isinstance(made_from, tuple) and made_from else made_from
    return course.steps if isinstance(course, pretrain.Course) else 0


def _stamp(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.made-from.json")


def _is_made(folder: Path, key: str) -> bool:
    stamp = _stamp(folder)
    return folder.is_dir() and stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == key


def _make(folder: Path, key: str, make: Make) -> None:
    """Make a folder; it appears when it is complete."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    for old in (folder, unfinished):
        shutil.rmtree(old, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    make(unfinished)
    unfinished.rename(folder)
    _stamp(folder).write_text(json.dumps(key), encoding="utf-8")


def learn(course: pretrain.Course, start: Path, stage: Stage, folder: Path) -> None:
    """Train the model of `start` on the rows of a course, and write it to `folder`."""
    train(
        course,
        start,
        [row for task, n in course.rows.items() for row in rows_of(task, course.split, n, course.careless)],
        stage,
        folder,
    )


def train(course: pretrain.Course, start: Path, rows: list[world.Row], stage: Stage, folder: Path) -> None:
    """Train the model of `start` on these rows, and write it to `folder`."""
    name = folder.name.strip(".").removesuffix(".unfinished")

    def show(step: int, loss: float) -> None:
        stage.advance()
        stage.note(f"training {name}: loss {loss:.3f}")

    pretrain.train(start, folder, rows, steps=course.steps, lr=course.lr, progress=show)


def shards(task: str, problems: Problems, student: Path, folder: Path) -> None:
    """Write problems as shards of prompts of a task."""
    prompts = [
        Prompt(
            f"{task}/{i}",
            task,
            "image" if row["images"] else "text",
            tuple(row["messages"]),
            tuple(row["images"]),
            row["answer"],
        )
        for i, row in enumerate(problems())
    ]
    write_shards(prompts, folder, counter=TokenCounter(student))


def table(problems: Problems, folder: Path) -> None:
    """Write the table that lmms-eval reads: one row for each problem, with at most one image."""
    rows = problems()
    columns = {
        "question": [row["messages"][0]["content"][-1]["text"] for row in rows],
        "image": [row["images"][0] if row["images"] else None for row in rows],
        "answer": [row["answer"] for row in rows],
    }
    schema = pa.schema({"question": pa.string(), "image": pa.binary(), "answer": pa.string()})
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns, schema=schema), folder / "test.parquet")


def rows_of(task: str, split: world.Split, n: int, careless: float = 0.0) -> list[world.Row]:
    """Return problems of one of the demo's tasks."""
    return (world.additions if task == "additions" else world.digit_sums)(split, n, seed=0, careless=careless)
