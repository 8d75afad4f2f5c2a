"""A file or folder that is missing is named by the key or the option that named it, before any process is started."""

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from mmopd import catalog
from mmopd.cli import app
from mmopd.commands import job
from mmopd.errors import UserError
from mmopd.prompts import open_mixture
from mmopd.runtime.progress import Stages
from mmopd.train.held_out import held_out_sources


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


OBJECTIVE = (
    "algorithm.objective.kind=grpo",
    "algorithm.balance=null",
    "algorithm.margin=null",
    "algorithm.visual=null",
)
NO_TEACHERS = ("fleet=null", *OBJECTIVE)


@pytest.mark.parametrize(
    ("overrides", "model", "message"),
    [
        (["fleet=teachers/none.yaml"], False, r"^fleet: teachers/none\.yaml: no such file"),
        (["fleet=teachers"], False, r"^fleet: teachers: (this is a folder; give a file|no such file)"),
        (["student.model=none"], False, r"^student\.model: none: no model in this folder"),
        ([*NO_TEACHERS, "mixture=data/none.yaml"], True, r"^mixture: data/none\.yaml: no such file"),
        (NO_TEACHERS, True, r"^sources\.\w+\.shards: .*\.mmopd/demo/shards/\w+: no such folder of shards"),
    ],
)
def test_what_a_recipe_or_a_mixture_names_is_named_by_its_key(
    overrides: list[str], model: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model:
        monkeypatch.setattr(job, "check_model", lambda folder: None)
    with pytest.raises(UserError, match=message):
        job.check(catalog.load_recipe("recipes/demo.yaml", overrides=overrides))


def test_the_model_of_a_teacher_is_named_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    check = job.check_model
    monkeypatch.setattr(job, "check_model", lambda folder: None if folder.name == "base" else check(folder))
    with pytest.raises(UserError, match=r"^teachers\.\w+\.model: .*_teacher: no model in this folder"):
        job.check(catalog.load_recipe("recipes/demo.yaml"))


def test_the_suite_is_named_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("check_model", "open_mixture", "check_tokenizers"):
        monkeypatch.setattr(job, name, lambda *_: {})
    recipe = catalog.load_recipe("recipes/demo.yaml", overrides=[*NO_TEACHERS, "suite=eval/none.yaml"])
    with pytest.raises(UserError, match=r"^suite: eval/none\.yaml: no such file"):
        job.check(recipe)


def test_the_preparation_is_named_by_its_key() -> None:
    recipe = catalog.load_recipe("recipes/demo.yaml", overrides=["prepare=data/none.py"])
    with (
        Stages(Console(quiet=True)) as stages,
        pytest.raises(UserError, match=r"^prepare: data/none\.py: no such file"),
    ):
        job.prepare(recipe, stages)


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("data/none.yaml", r"^evaluate\.mixture: data/none\.yaml: no such file"),
        ("data/demo.yaml", r"^evaluate\.mixture: data/demo\.yaml: sources\.\w+\.shards: .*: no such folder of shards"),
    ],
)
def test_held_out_rows_are_named_by_their_key(mixture: str, message: str) -> None:
    recipe = catalog.load_recipe("recipes/demo.yaml", overrides=[f"evaluate.mixture={mixture}"])
    with pytest.raises(UserError, match=message):
        held_out_sources(recipe, {})


def test_remote_shards_are_named_by_their_key(here: Path) -> None:
    mixture = catalog.load_mixture("data/demo.yaml").model_copy(deep=True)
    name, source = next(iter(mixture.sources.items()))
    missing = source.model_copy(update={"shards": (here / "none").as_uri()})
    with pytest.raises(UserError, match=rf"^sources\.{name}\.shards: file://"):
        open_mixture(mixture.model_copy(update={"sources": {name: missing}}), [source.task], here)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "none"], "^none: no such folder"),
        (["index", ".", "--processor", "none"], "^--processor none: no such folder"),
        (["prepare", "data/generic.py", "out", "--processor", "none"], "^--processor none: no such folder"),
        (["prepare", "data/none.py", "out"], r"^data/none\.py: no such file"),
        (
            ["prepare", "data/generic.py", "out", "--set", "data=a.csv", "--set", "task=additions"],
            r"^data: a\.csv: no such",
        ),
    ],
)
def test_what_a_command_names_is_named_by_its_option(here: Path, arguments: list[str], message: str) -> None:
    (here / "a.tar").touch()
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
