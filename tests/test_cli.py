"""The command line: what each command prints, and that help explains."""

import errno
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmopd import __version__
from mmopd.cli import app
from mmopd.config import Recipe, Student
from mmopd.errors import UserError
from mmopd.runtime.run_folder import RunFolder, alone_in

run = CliRunner().invoke


@pytest.mark.parametrize("command", ["init", "demo", "train", "eval", "report", "show", "doctor"])
def test_every_command_explains_itself(command: str) -> None:
    done = run(app, [command, "--help"])
    assert done.exit_code == 0
    assert "Usage" in done.output
    assert command in run(app, ["--help"]).output


def test_version() -> None:
    assert run(app, ["--version"]).output.strip() == __version__


def test_init_makes_a_workspace_and_keeps_what_is_there(tmp_path: Path) -> None:
    assert run(app, ["init", str(tmp_path)]).exit_code == 0
    recipe = tmp_path / "recipes" / "demo.yaml"
    recipe.write_text("mine", encoding="utf-8")
    again = run(app, ["init", str(tmp_path)])
    assert again.exit_code == 0
    assert recipe.read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "modalities" / "additions.py").is_file()


def test_show_prints_every_default_and_what_it_would_start() -> None:
    output = run(app, ["show", "recipes/demo.yaml", "train.steps=7"]).output
    assert "steps: 7" in output
    assert "log_ratio_clip: 10.0" in output
    assert "text_teacher" in output
    assert "2 training ranks" in output


def test_train_wants_a_recipe_or_a_run_and_resume_wants_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give a recipe"):
        run(app, ["train"], catch_exceptions=False)
    with pytest.raises(UserError, match="--resume takes no recipe and no key=value"):
        run(app, ["train", "train.steps=9", "--resume", str(tmp_path)], catch_exceptions=False)
    with pytest.raises(UserError, match="not a run folder"):
        run(app, ["train", "--resume", str(tmp_path)], catch_exceptions=False)


def test_a_folder_in_which_another_process_is_at_work_is_left_alone(tmp_path: Path) -> None:
    recipe = Recipe(student=Student(model=Path("m")), fleet=Path("f"), mixture=Path("d"))
    RunFolder(tmp_path / "run").create(recipe)
    for command, folder in (
        (["train", "--resume"], tmp_path / "run"),
        (["compare", "recipes/compare_demo.yaml", "--out"], tmp_path / "out"),
    ):
        with (
            alone_in(folder),
            pytest.raises(
                UserError, match=f"{folder}: another mmopd is at work in this folder; wait for it, or stop it"
            ),
        ):
            run(app, [*command, str(folder)], catch_exceptions=False)
    with alone_in(tmp_path / "run"):
        pass


@pytest.mark.parametrize(("number", "goes_on"), [(errno.ENOLCK, True), (errno.EIO, False)])
def test_where_a_file_system_has_no_locks_nobody_is_kept_out(
    number: int, goes_on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(number, "flock")

    monkeypatch.setattr("mmopd.runtime.locks.fcntl.flock", flock)
    with nullcontext() if goes_on else pytest.raises(OSError, match="flock"), alone_in(tmp_path):
        pass


def test_doctor_names_what_it_looked_at() -> None:
    output = run(app, ["doctor"]).output
    for part in ("python", "torch", "vllm", "deepspeed", "memory"):
        assert part in output.lower()
