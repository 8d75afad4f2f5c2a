import dataclasses
import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mmopd import catalog
from mmopd.demo.world import build_student
from mmopd.modality import Encoder
from mmopd.runtime.progress import Stages

# Before any test starts a process: the machine's few cores are shared by servers, ranks and the tests themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# In the background or under nohup these are ignored, and so would be in every process that a test interrupts or hangs
# up on.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take minutes come first, so that the last worker is not left alone with one of them.
LONG = (
    "resume",
    "end_to_end",
    "objectives",
    "trainer",
    "students",
    "evaluate",
    "lora",
    "tutorial",
    "video",
    "sandbox",
    "bad_input",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's student, not trained."""
    folder = tmp_path_factory.mktemp("student")
    build_student(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(model: Path) -> Encoder:
    """Of that student."""
    return Encoder(model)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's own preparation with few rows and few steps, and a recipe that takes it as it is."""
    folder = tmp_path_factory.mktemp("workspace")
    world = catalog.load_module(catalog.shipped() / "data" / "demo.py")
    for name in ("BASE", "TEXT_TEACHER", "IMAGE_TEACHER"):
        setattr(world, name, dataclasses.replace(getattr(world, name), steps=12))
    world.PROMPTS = dict.fromkeys(world.PROMPTS, 16)
    world.HELD_OUT = dict.fromkeys(world.HELD_OUT, 6)
    with Stages(Console(quiet=True)) as stages, stages.stage("prepare") as stage:
        world.prepare(folder, stage)
    recipe = (catalog.shipped() / "recipes" / "demo.yaml").read_text()
    (folder / "recipes").mkdir()
    (folder / "recipes" / "small.yaml").write_text(recipe.replace("prepare: data/demo.py\n", ""))
    return folder
