"""Mistakes in the input of a run: each gives one clear message before the start, and no process or file is left."""

import json
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from mmopd import catalog
from mmopd.commands.job import check
from mmopd.commands.train import launch
from mmopd.config import Recipe
from mmopd.errors import ConfigError, UserError
from mmopd.runtime.run_folder import RunFolder

DEMO = Path(".mmopd") / "demo"


@pytest.fixture
def mine(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the workspace that a test may break; it is the current folder."""
    folder = tmp_path / "mine"
    shutil.copytree(workspace / ".mmopd" / "demo", folder / DEMO)
    shutil.copytree(workspace / "recipes", folder / "recipes")
    shutil.copytree(catalog.shipped() / "teachers", folder / "teachers")
    monkeypatch.chdir(folder)
    return folder


def recipe(*overrides: str) -> Recipe:
    return catalog.load_recipe("recipes/small.yaml", overrides=["suite=null", "algorithm.difficulty=null", *overrides])


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def run_and_fail(resolved: Recipe) -> str:
    """Return the message of a run that cannot start, and check that no process is left."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    folder = RunFolder(Path("runs/bad"))
    folder.create(resolved)
    with pytest.raises(UserError) as error:
        launch(folder, resolved, Console(quiet=True))
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert not folder.endpoints.exists()
    return str(error.value)


def test_a_typo_is_one_line_with_the_status_of_a_wrong_setting_and_no_traceback(mine: Path) -> None:
    edit(mine / "recipes" / "small.yaml", lambda text: text.replace("rollout:", "rolout:"))
    done = subprocess.run(
        [sys.executable, "-m", "mmopd", "train", "recipes/small.yaml"],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    assert done.returncode == ConfigError.exit_status
    assert "recipes/small.yaml: unknown key 'rolout'; did you mean 'rollout'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (mine / "runs").exists()


def test_a_missing_shard_is_named(mine: Path) -> None:
    tar = next((mine / DEMO / "shards" / "additions").glob("*.tar"))
    tar.unlink()
    with pytest.raises(UserError, match=tar.name):
        check(recipe())


def test_a_truncated_shard_is_named(mine: Path) -> None:
    tar = next((mine / DEMO / "shards" / "digit_sum").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-3000])
    with pytest.raises(UserError, match=tar.name):
        check(recipe())


def test_a_prompt_without_a_teacher_is_named_with_the_routes(mine: Path) -> None:
    edit(
        mine / "teachers" / "demo.yaml",
        lambda text: text.replace("  - {modality: image, teacher: image_teacher}\n", ""),
    )
    with pytest.raises(UserError, match="no route for prompts of task 'digit_sum' and modality 'image'"):
        check(recipe())


def test_a_teacher_with_other_token_ids_is_named(mine: Path) -> None:
    def swap(text: str) -> str:
        tokenizer = json.loads(text)
        vocab = tokenizer["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
        return json.dumps(tokenizer)

    edit(mine / DEMO / "text_teacher" / "tokenizer.json", swap)
    with pytest.raises(UserError, match=r"teacher 'text_teacher'.*2 of 1024 tokens differ"):
        check(recipe())


def test_a_folder_without_a_model_is_named(mine: Path) -> None:
    shutil.rmtree(mine / DEMO / "base")
    with pytest.raises(UserError, match="demo/base: no model in this folder"):
        check(recipe())


def test_a_port_that_is_taken_is_named_with_its_key(mine: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = run_and_fail(recipe(f"student.engine.port={port}"))
    assert f"port {port} on 127.0.0.1 for server 'student' cannot be used" in message
    assert "engine.port" in message


def test_too_little_memory_is_said_before_anything_starts(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "available total")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(1 << 30, 2 << 30))
    assert "3 vLLM servers need about" in run_and_fail(recipe())


@pytest.mark.usefixtures("server")
def test_a_server_that_dies_during_start_shows_its_last_words(mine: Path) -> None:
    edit(
        mine / "teachers" / "demo.yaml",
        lambda text: text.replace("engine: *tiny", "engine: {kv_cache_mib: 64, extra_args: [--no-such-flag]}"),
    )
    message = run_and_fail(recipe())
    assert "server 'image_teacher.0' ended" in message
    assert "--no-such-flag" in message
    assert "image_teacher.0.log" in message
