"""Damaged files of checkpoints: the checkpoint before is taken, or the file is named; never a traceback."""

import json
from pathlib import Path
from typing import Any

import pytest

from mmopd.errors import CheckpointError
from mmopd.train.checkpoint import Checkpoints
from mmopd.train.checkpoint_files import problem, read_state

STATE: dict[str, Any] = {"step": 1, "ranks": 2, "score": 0.5, "caller": {}}


def write(folder: Path, step: int, **state: Any) -> Path:
    path = folder / f"step-{step:08d}"
    path.mkdir()
    (path / "state.json").write_text(json.dumps({**STATE, **state}), encoding="utf-8")
    size = (path / "state.json").stat().st_size
    (path / "manifest.json").write_text(json.dumps({"state.json": [size, ""]}), encoding="utf-8")
    return path


OTHER = ('{"zero": [1, ""]}', '{"state.json": 1}', '{"state.json": ["a", ""]}', "\xff")


@pytest.mark.parametrize("manifest", ["", "{", "[]", "1", "null", "{}", "[" * 9999, *OTHER])
def test_a_checkpoint_with_a_damaged_manifest_is_left_out(tmp_path: Path, manifest: str) -> None:
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    (bad / "manifest.json").write_text(manifest, encoding="latin-1")
    assert Checkpoints(tmp_path, keep=2).latest() == good
    assert str(bad / "manifest.json") in problem(bad)


@pytest.mark.parametrize("state", ["", "{", "[]", "null", "{}", '{"step": 1, "ranks": "2", "caller": {}}', "[" * 9999])
def test_a_damaged_state_is_named_with_the_way_out(tmp_path: Path, state: str) -> None:
    bad = write(tmp_path, 2)
    (bad / "state.json").write_text(state, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"state\.json: damaged .*; remove {bad} to go on"):
        read_state(bad)


def test_a_run_goes_on_if_an_older_checkpoint_is_damaged_and_drops_it(tmp_path: Path) -> None:
    for step, score in ((1, 0.1), (2, 0.9), (3, 0.5), (4, 0.0)):
        write(tmp_path, step, score=score)
    state = tmp_path / "step-00000002" / "state.json"
    state.write_text("x" * state.stat().st_size, encoding="utf-8")
    Checkpoints(tmp_path, keep=1, best=1)._prune()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
