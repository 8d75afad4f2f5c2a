"""Folders with prompts, answers and logs are not for other users of the machine."""

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mmopd.config import Recipe
from mmopd.runtime.run_folder import RunFolder, alone_in, make_private


@pytest.fixture(autouse=True)
def _open_mask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def mode(folder: Path) -> int:
    return folder.stat().st_mode & 0o777


def test_a_run_folder_is_private_and_its_parent_is_not_touched(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "mine")
    run.create(Recipe.model_validate({"student": {"model": "m"}, "mixture": "data/m.yaml", "fleet": "t.yaml"}))
    assert mode(run.root) == 0o700
    assert mode(run.root.parent) == 0o777


def test_a_folder_that_a_command_locks_is_private(tmp_path: Path) -> None:
    with alone_in(tmp_path / "comparison"):
        assert mode(tmp_path / "comparison") == 0o700


def test_a_folder_that_the_user_has_made_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o750)
    assert mode(make_private(tmp_path)) == 0o750


class Stop(Exception):
    pass


def stop(*args: Any, **settings: Any) -> None:
    raise Stop


CONSOLE = Console(quiet=True)
COMMANDS = {
    "examine": ("prepare", lambda call, out: call.examine(None, out, CONSOLE)),
    "difficulty": ("prepare", lambda call, out: call.measure(None, out, CONSOLE)),
    "evaluate": ("warm_up", lambda call, out: call.evaluate_models(Path(), [], None, out, CONSOLE)),
    "serve": (
        "Children",
        lambda call, out: call.serve(
            SimpleNamespace(teachers={}), host="127.0.0.1", out=out / "e.json", key_variable=None, console=CONSOLE
        ),
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_creates_a_private_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = import_module(f"mmopd.commands.{name}")
    first, call = COMMANDS[name]
    monkeypatch.setattr(command, first, stop)
    if name == "evaluate":
        monkeypatch.setattr(command, "read_suite", lambda *given: None)
        monkeypatch.setattr(command, "catalog", SimpleNamespace(find=Path))
    if name == "serve":
        monkeypatch.setattr(command, "to_specs", lambda fleet: [SimpleNamespace(model=Path())])
        monkeypatch.setattr(command, "check_model", lambda folder: None)
    with pytest.raises(Stop):
        call(command, tmp_path / "out")
    made = tmp_path / "out" / "e-logs" if name == "serve" else tmp_path / "out"
    assert mode(made) == 0o700
