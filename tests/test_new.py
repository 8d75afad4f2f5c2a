"""`mmopd new`: each kind is accepted as it is written, in an empty workspace; tasks, objectives and scorers run."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mmopd import catalog, load_tasks, settings_file
from mmopd.algorithm import Step, Tokens
from mmopd.cli import app
from mmopd.commands.new import FILES, Kind, write
from mmopd.config import Recipe
from mmopd.errors import UserError
from mmopd.evaluate.run import read_suite

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mmopd(*arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("kind", Kind)
def test_each_kind_is_written_with_what_to_do_next_and_shown_as_it_is(kind: Kind, here: Path) -> None:
    said = mmopd("new", kind, "mine")
    files = [path.format("mine") for path in FILES[kind].values()]
    assert sorted(str(path.relative_to(here)) for path in here.rglob("*.*")) == sorted(files)
    assert all(f"wrote {path}\n" in said for path in files)
    assert f"mmopd show {files[0]}" in said
    assert "{" not in said.replace("{kind: mine}", "")
    assert len(mmopd("show", files[0]).splitlines()) > 2
    assert json.loads(mmopd("show", files[0], "--json"))


def test_what_is_written_passes_the_rules_of_python_files_and_has_comments(here: Path) -> None:
    for kind in Kind:
        write(kind, "mine")
    for path in here.rglob("*.*"):
        assert re.search(r'# |"""', path.read_text(encoding="utf-8")), path
    rules = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    for command in (["check", *rules], ["format", "--check", *rules]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], capture_output=True, text=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, done.stdout


def test_nothing_is_overwritten_and_no_half_is_written(here: Path) -> None:
    (here / "eval" / "tasks").mkdir(parents=True)
    (here / "eval" / "tasks" / "mine.py").write_text("kept", encoding="utf-8")
    with pytest.raises(UserError, match=r"eval/tasks/mine\.py: this file exists already"):
        mmopd("new", "benchmark", "mine")
    assert [path.name for path in here.rglob("*.*")] == ["mine.py"]


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("task", "../mine", "'../mine': a name has letters"),
        ("task", "class", "'class': a name has letters"),
        ("recipe", "my-run", "'my-run': a name has letters"),
        ("recipe", "{{ 1 }}", "a name has letters"),
        ("task", "", "a name has letters"),
        ("objective", "grpo", r"algorithm/grpo\.py: mmopd ships an objective of this name"),
        ("recipe", "demo", r"recipes/demo\.yaml: mmopd ships a file of this name"),
    ],
)
def test_a_name_that_cannot_be_one_is_refused(kind: str, name: str, message: str, here: Path) -> None:
    with pytest.raises(UserError, match=message):
        mmopd("new", kind, "--", name)
    assert not [*here.iterdir()]


def test_the_new_task_judges_answers() -> None:
    write(Kind.TASK, "capitals")
    task = load_tasks()["capitals"]
    (message,) = task.messages("Capital of France?", 0)
    assert message["content"][-1]["text"].startswith("Capital of France?\n")
    answers = {"The answer is Paris.": 1, "I think so.\n\\boxed{paris}": 1, "The answer is Rome.": 0, "": 0}
    assert {answer: task.verify(answer, "Paris").value for answer in answers} == answers
    assert not task.verify("Paris", " ").known


def test_the_new_objective_learns_more_from_wrong_responses() -> None:
    write(Kind.OBJECTIVE, "count_dots")
    settings = {"student": {"model": "m"}, "fleet": "f", "mixture": "x"}
    recipe = settings_file.build(Recipe, settings, "r", ["algorithm.objective={kind: count_dots, wrong: 3}"])
    objective = recipe.algorithm.objective
    assert type(objective).__name__ == "CountDots"
    student = torch.tensor([-1.0, -2.0, -1.0])
    teacher = torch.tensor([-1.5, -1.0, -0.5])
    step = Step(
        response=torch.tensor([0, 0, 1]),
        student=student,
        teacher=teacher,
        reference=None,
        outcome=torch.tensor([1.0, 0.0]),
        group=torch.tensor([0, 0]),
        weight=torch.ones(2),
        settings=recipe.algorithm,
        seed=0,
    )
    targets = objective.targets(step)
    assert targets.token_weight.tolist() == [0.25, 0.25, 1.5]  # a mean over 2 tokens and 2 responses; 3 x a mean over 1
    logprob = student.clone().requires_grad_()
    loss = objective.loss(Tokens(logprob, student, targets.advantage, targets.token_weight, None), recipe.algorithm)
    assert loss.item() == pytest.approx(-(0.25 * -0.5 + 0.25 * 1.0 + 1.5 * 0.5))
    loss.backward()
    assert logprob.grad is not None
    assert logprob.grad.tolist() == pytest.approx([0.125, -0.25, -0.75])


def test_the_new_benchmark_has_its_task_and_its_scorer_judges(here: Path) -> None:
    write(Kind.BENCHMARK, "sums")
    (benchmark,) = read_suite(here / "eval" / "sums.yaml", here).benchmarks
    assert Path(benchmark.task) == here / "eval" / "tasks" / "sums.yaml"
    spec = importlib.util.spec_from_file_location("sums", here / "eval" / "tasks" / "sums.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.score({"answer": "132"}, ["7+5=12 =132"]) == {"accuracy": 1.0}
    assert module.images({"image": None}) == []


def test_the_new_recipe_names_the_new_files() -> None:
    for kind in (Kind.RECIPE, Kind.TEACHER, Kind.MIXTURE):
        write(kind, "mine")
    shown = mmopd("show", "recipes/mine.yaml", "fleet=teachers/mine.yaml", "mixture=data/mine.yaml")
    assert "responses to */*" in shown
    assert catalog.load_fleet("teachers/mine.yaml").routes[0].teachers == {"mine": 1.0}


def test_show_names_what_is_wrong_in_other_files_than_recipes(here: Path) -> None:
    write(Kind.TEACHER, "mine")
    fleet = here / "teachers" / "mine.yaml"
    fleet.write_text(fleet.read_text(encoding="utf-8") + "views: {v: {instead: '{x'}}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"teachers/mine\.yaml: view 'v': `instead` is text in place of the images"):
        mmopd("show", "teachers/mine.yaml")
    (here / "modalities").mkdir()
    (here / "modalities" / "empty.py").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"modalities/empty\.py: it defines no `task = Task"):
        mmopd("show", "modalities/empty.py")
    (here / "modalities" / "bad.py").write_text(
        "from mmopd import Task\ntask = Task('bad', 'text', messages=lambda question, images: 1 / 0)", encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"bad\.py: `messages` of the task raises ZeroDivisionError"):
        mmopd("show", "modalities/bad.py")
    with pytest.raises(UserError, match=r"mmopd show takes Python files of modalities/ \(a task\)"):
        mmopd("show", "data/generic.py")
    with pytest.raises(UserError, match="this is a fleet of teachers; key=value is for a recipe"):
        mmopd("show", "teachers/demo.yaml", "weight=2")


def test_a_mixture_whose_shards_are_not_there_yet_is_shown_and_says_what_writes_them() -> None:
    write(Kind.MIXTURE, "mine")
    shown = " ".join(mmopd("show", "data/mine.yaml").split())
    assert "mine 100.0% of the prompts, not there yet" in shown
    assert "shards/mine: no such folder; `mmopd prepare CONVERTER shards/mine` writes it" in shown
    assert json.loads(mmopd("show", "data/mine.yaml", "--json"))["missing"] == {"mine": "shards/mine"}


def test_writing_a_file_loads_no_heavy_library(here: Path) -> None:
    code = "import sys; sys.argv = ['mmopd', 'new', 'objective', 'mine']\n"
    code += "from mmopd.cli import app; app(standalone_mode=False); print({'torch', 'numpy'} & sys.modules.keys())"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, encoding="utf-8", check=False
    )
    assert done.stdout.splitlines()[-1] == "set()", done.stderr[-2000:]
