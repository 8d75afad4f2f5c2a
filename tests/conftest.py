import dataclasses
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotations  # noqa: F401  (checks the annotations of what is imported after it)
import forks
import pytest
import torch
from rich.console import Console

from mmopd import catalog
from mmopd.commands import options
from mmopd.demo.world import build_student
from mmopd.modality import Encoder
from mmopd.runtime.http import SPELLINGS
from mmopd.runtime.progress import Stages
from mmopd.serving import supervisor

# Set before any test starts a process: servers, ranks and the tests themselves share the machine's few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in SPELLINGS:  # the tests' own requests are all for 127.0.0.1
    os.environ.pop(name, None)
torch.set_num_threads(1)
forks.install()
options.console.width = 200  # tables of commands that are called in this process have long paths
# In the background or under nohup these signals are ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that start servers or ranks come first, the longest before the others, so that none runs alone at the end.
LONG = (
    "resume",
    "objectives",
    "trainer",
    "end_to_end",
    "students",
    "serve",
    "current_folder",
    "sandbox",
    "golden",
    "tutorial",
    "scoring",
    "evaluate",
    "benchmarks",
    "sampling_defaults",
    "security",
    "ranks",
    "preflight",
    "adapters",
    "lora",
    "video",
    "faults",
    "repeatable",
    "views",
    "tasks",
    "bad_input",
    "objective_plugin",
    "heads",
    "supervisor",
    "replay",
    "estimate",
    "text_teacher",
    "serve_command",
)

# Parts of command lines that only a test with the mark `server` may start: vLLM's supervisor, and training ranks.
HEAVY = (f"'-m', '{supervisor.__name__}'", "'-m', 'mmopd.train.rank'", "golden/worker.py")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONG)))
    for item in items:
        if "server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.server)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Fail a test that starts a server or a rank without requesting `server`: `make test-fast` would run it."""
    plain = subprocess.Popen.__init__

    def start(process: Any, command: Any, *args: Any, **settings: Any) -> None:
        if any(part in str(command) for part in HEAVY):
            pytest.fail(f"{command}: what starts this has to ask for the fixture `server`")
        plain(process, command, *args, **settings)

    def fork(*call: Any) -> Any:
        pytest.fail("what starts a rank has to ask for the fixture `server`")

    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("server"):
            patch.setattr(subprocess.Popen, "__init__", start)
            patch.setattr(forks, "connect", fork)
        return (yield)


@pytest.fixture(scope="session")
def server() -> None:
    """Mark tests that start vLLM, training ranks or lmms-eval: `make test-fast` leaves out all that depend on this."""


@pytest.fixture(scope="session", autouse=True)
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder of the session that all processes of tests have as their Hugging Face cache, not the user's."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the demo's student, untrained."""
    folder = tmp_path_factory.mktemp("student")
    build_student(folder)
    return folder


@pytest.fixture(scope="session")
def encoder(model: Path) -> Encoder:
    """Return the encoder of that student."""
    return Encoder(model)


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with the demo's own preparation, with few rows and few steps, and a recipe for it."""
    folder = tmp_path_factory.mktemp("workspace")
    world = catalog.load_module(catalog.shipped() / "data" / "demo.py")
    for name in ("BASE", "TEXT_TEACHER", "IMAGE_TEACHER"):
        course = getattr(world, name)  # of 12 steps, 768 rows at most are seen; all are encoded before
        setattr(world, name, dataclasses.replace(course, steps=12, rows=dict.fromkeys(course.rows, 400)))
    world.PROMPTS = dict.fromkeys(world.PROMPTS, 16)
    world.HELD_OUT = dict.fromkeys(world.HELD_OUT, 6)
    with Stages(Console(quiet=True)) as stages, stages.stage("prepare") as stage:
        world.prepare(folder, stage)
    recipe = (catalog.shipped() / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    (folder / "recipes").mkdir()
    (folder / "recipes" / "small.yaml").write_text(recipe.replace("prepare: data/demo.py\n", ""), encoding="utf-8")
    return folder
