"""The examples of the README work unchanged."""

import re
from pathlib import Path

import pytest
from PIL import Image

from mmopd import catalog, settings_file
from mmopd.config import Fleet, Mixture, Recipe
from mmopd.prompts.shards import open_mixture
from mmopd.task.load import load_tasks
from mmopd.teacher.router import check_routes, find_route

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a workspace with the README's files, saved under the names that it gives them."""
    task, _ = blocks("python")
    mixture, fleet, recipe = blocks("yaml")
    files = {
        "modalities/clock.py": task,
        "data/mine.yaml": mixture,
        "teachers/mine.yaml": fleet,
        "recipes/mine.yaml": recipe,
    }
    for name, text in files.items():
        assert f"`{name}`" in README
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_task_has_ten_to_twenty_lines_and_judges():
    task, _ = blocks("python")
    assert 10 <= len([line for line in task.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize(
    ("response", "outcome"),
    [("It is 10:25", 1.0), ("10:21", 0.5), ("10:19", 0.0), ("I cannot say", 0.0), ("10:25 or so", 0.0)],
)
def test_the_task_judges_as_it_says(workspace, response, outcome):
    assert load_tasks(workspace)["clock"].verify(response, "10:25").value == outcome


def test_the_rows_become_shards_that_the_mixture_finds(workspace):
    (workspace / "photos").mkdir()
    for time in ("10-25", "03-40"):
        Image.new("RGB", (32, 32)).save(workspace / "photos" / f"{time}.png")
    exec(blocks("python")[1], {})
    mixture = catalog.load_mixture("data/mine.yaml", workspace)
    shards = open_mixture(Mixture(sources={"clock": mixture.sources["clock"]}), load_tasks(workspace), workspace)
    assert sorted(row.answer for row in shards["clock"]) == ["03:40", "10:25"]
    assert shards["clock"].kinds == {("clock", "image"): 2}


def test_the_fleet_routes_every_task_of_the_mixture(workspace):
    fleet, mixture = (
        catalog.load_fleet("teachers/mine.yaml", workspace),
        catalog.load_mixture("data/mine.yaml", workspace),
    )
    tasks = load_tasks(workspace)
    check_routes(fleet, tasks, [(source.task, tasks[source.task].modality) for source in mixture.sources.values()])
    assert find_route(fleet, "clock", "image").teacher == "vision"
    assert isinstance(fleet, Fleet)


def test_the_recipe_loads_and_names_files_that_there_are(workspace):
    recipe = catalog.load_recipe("recipes/mine.yaml", workspace, ["train.steps=20"])
    assert recipe.train.steps == 20
    assert recipe.suite is not None
    assert [catalog.find(name, workspace) for name in (recipe.fleet, recipe.mixture, recipe.suite)]
    assert settings_file.read(Recipe, workspace / "recipes/mine.yaml").train.steps == 200


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_a_link_leads_somewhere(target):
    assert (Path(__file__).parents[1] / target).exists()


def test_every_command_of_the_readme_exists():
    from mmopd.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(re.findall(r"`mmopd ([a-z]+)", README)) <= known
