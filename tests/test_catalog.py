"""The catalogue: every shipped file loads, files of a workspace come first, and a file that does not load is named."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mmopd import catalog
from mmopd.algorithm.objectives import OPD
from mmopd.algorithm.settings import Balance, Difficulty, Margin
from mmopd.errors import UserError
from mmopd.prompts import Shards
from mmopd.task import Task
from mmopd.task.load import load_tasks

LOADERS = {
    "teachers": catalog.load_fleet,
    "data": catalog.load_mixture,
    "eval": catalog.load_suite,
    "recipes": catalog.load_recipe,
}
FILES = [
    path.relative_to(catalog.shipped())
    for kind in LOADERS
    for path in sorted((catalog.shipped() / kind).glob("*.yaml"))
]
COMPARISONS = [name for name in FILES if name.stem.startswith("compare_")]
CODE = [path.relative_to(catalog.shipped()) for path in sorted((catalog.shipped() / "data").glob("*.py"))]
BODY = "from mmopd.task import Task, verify\ntask = Task(name={name!r}, modality='text', verify=verify.exact)\n"


def test_there_is_something_of_each_kind() -> None:
    for kind in catalog.KINDS:
        assert (catalog.shipped() / kind).is_dir()
        assert any((catalog.shipped() / kind).iterdir())


@pytest.mark.parametrize("name", FILES, ids=str)
def test_a_shipped_file_loads(name: Path, tmp_path: Path) -> None:
    load = catalog.load_comparison if name in COMPARISONS else LOADERS[name.parent.name]
    load(name, tmp_path)


@pytest.mark.parametrize("name", CODE, ids=str)
def test_shipped_code_runs_and_can_prepare_or_convert(name: Path) -> None:
    module = catalog.load_module(catalog.shipped() / name)
    assert callable(getattr(module, "prepare", None)) or (callable(module.examples) and callable(module.convert))


@pytest.mark.parametrize(
    "name", [name for name in FILES if name.parent.name == "recipes" and not name.stem.startswith("compare_")], ids=str
)
def test_what_a_shipped_recipe_names_is_there(name: Path, tmp_path: Path) -> None:
    recipe = catalog.load_recipe(name, tmp_path)
    fleet, mixture = catalog.load_fleet(recipe.fleet, tmp_path), catalog.load_mixture(recipe.mixture, tmp_path)
    assert fleet.teachers
    assert {source.task for source in mixture.sources.values()} <= load_tasks(tmp_path).keys()
    if recipe.suite:
        catalog.load_suite(recipe.suite, tmp_path)
    if recipe.prepare:
        catalog.find(recipe.prepare, tmp_path)


@pytest.mark.parametrize("name", COMPARISONS, ids=str)
def test_every_variant_of_a_shipped_comparison_is_a_recipe_that_loads(name: Path, tmp_path: Path) -> None:
    comparison = catalog.load_comparison(name, tmp_path)
    seen = set()
    for variant in comparison.variants.values():
        overrides = [f"{key}={json.dumps(value)}" for key, value in {**comparison.set, **variant.set}.items()]
        seen.add(catalog.load_recipe(comparison.recipe, tmp_path, overrides).model_dump_json())
    assert len(seen) == len(comparison.variants), "two variants are the same recipe"


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("cross_modal_4b", "lift"),
        ("multi_teacher_2b", "lift"),
        ("multi_teacher_4b", "lift"),
        ("strong_to_weak_text", "spread"),
    ],
)
def test_a_recipe_of_the_paper_has_its_hyperparameters(name: str, direction: str, tmp_path: Path) -> None:
    recipe = catalog.load_recipe(f"recipes/{name}.yaml", tmp_path)
    rollout, algorithm, train = recipe.rollout, recipe.algorithm, recipe.train
    # Settings of the paper (its Table B.1).
    assert (rollout.prompts, rollout.group, rollout.prompts * rollout.group) == (64, 16, 1024)
    assert (rollout.temperature, rollout.max_tokens) == (1.0, 16_384)
    sources = catalog.load_mixture(recipe.mixture, tmp_path).sources
    assert {source.max_prompt_tokens for key, source in sources.items() if key != "infovqa"} == {
        2048
    }  # infographics: twice as many
    assert algorithm.balance == Balance(scope="group", ratio=1)
    assert algorithm.margin == Margin(kind="shift", scope="group", mode="mean", direction=direction, delta=0.4)
    assert algorithm.objective == OPD()
    assert (train.lr, train.schedule, train.warmup) == (1e-6, "constant", 5)
    assert (train.betas, train.weight_decay) == ((0.9, 0.98), 0.1)
    assert train.micro_tokens == 16_384
    # Section 2: the clipped ratio and the clip range of a token; section 4: difficulty.
    assert (algorithm.clip_low, algorithm.clip_high, algorithm.log_ratio_clip) == (0.2, 0.28, 10.0)
    assert algorithm.difficulty == Difficulty(attempts=8, temperature=1.0, top_p=0.95, top_k=50, cap=4)


def test_every_shipped_task_loads_under_the_name_of_its_file(tmp_path: Path) -> None:
    tasks = load_tasks(tmp_path)
    assert {"additions", "digit_sum"} <= tasks.keys()
    for name, task in tasks.items():
        assert (catalog.shipped() / "modalities" / f"{name}.py").is_file()
        row = task.prompt("k", "How many?", "2", [b"png"] * (task.modality == "image"))
        assert (row.task, row.modality, row.answer) == (name, task.modality, "2")
        assert "How many?" in row.messages[0]["content"][-1]["text"]
        assert task.verify("no idea", "2").value == 0 or not task.verify("no idea", "2").known


def blocks_of_readme() -> list[str]:
    return re.findall(
        r"```python\n(.*?)```", (catalog.shipped() / "modalities/README.md").read_text(encoding="utf-8"), re.DOTALL
    )


def test_the_example_of_the_readme_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, rows = blocks_of_readme()
    (tmp_path / "modalities").mkdir()
    (tmp_path / "modalities/count_letters.py").write_text(task, encoding="utf-8")
    assert len(task.splitlines()) <= 25
    judge = load_tasks(tmp_path)["count_letters"].verify
    assert [judge(said, "2").value for said in ("2", "So the answer is 3", "7", "two")] == [1.0, 0.5, 0.0, 0.0]
    monkeypatch.chdir(tmp_path)
    exec(rows, {})
    assert [row.answer for row in Shards(tmp_path / "shards/count_letters")] == ["1", "0", "4"]


def test_the_readme_lists_the_shipped_tasks() -> None:
    text = (catalog.shipped() / "modalities/README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\| `(\w+)` \|", text)) == {
        path.stem for path in (catalog.shipped() / "modalities").glob("*.py")
    }


def workspace_with(folder: Path, **files: str) -> Path:
    (folder / "modalities").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"modalities/{name}.py").write_text(text, encoding="utf-8")
    return folder


def test_a_file_of_the_workspace_comes_before_the_shipped_one(tmp_path: Path) -> None:
    workspace_with(tmp_path, additions=BODY.format(name="additions"), mine=BODY.format(name="mine"))
    tasks = load_tasks(tmp_path)
    assert tasks["additions"].verify is tasks["mine"].verify is not tasks["digit_sum"].verify
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/demo.yaml").write_text(
        "student: {model: m}\nfleet: f\nmixture: m\nseed: 41\n", encoding="utf-8"
    )
    assert catalog.load_recipe("recipes/demo.yaml", tmp_path).seed == 41
    assert catalog.load_recipe("recipes/demo.yaml", tmp_path / "elsewhere").seed != 41


def test_the_current_folder_is_the_workspace_unless_one_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace_with(tmp_path, mine=BODY.format(name="mine")))
    assert "mine" in load_tasks()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os\n\nraise RuntimeError('no luck')\n", r"mine\.py:3: RuntimeError: no luck"),
        ("def (:\n", r"mine\.py: SyntaxError"),
        ("import nonexistent_module\n", r"mine\.py:1: ModuleNotFoundError"),
        ("from mmopd.task import Task\ntask = Task(nam='x')\n", r"mine\.py:2: TypeError"),
        ("", r"mine\.py: it defines no `task = Task"),
        ("task = 'mine'\n", r"mine\.py: it defines no `task = Task"),
        (BODY.format(name="additions"), r"mine\.py: its task is named 'additions', as is that of .*additions\.py"),
    ],
)
def test_a_task_that_does_not_load_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_tasks(workspace_with(tmp_path, mine=text))


def test_a_file_that_is_not_there_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipes/dmeo\.yaml: no such file in .*did you mean 'recipes/demo\.yaml'"):
        catalog.find("recipes/dmeo.yaml", tmp_path)


def test_an_absolute_path_is_itself(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.yaml").write_text(yaml.safe_dump({"benchmarks": []}), encoding="utf-8")
    assert catalog.load_suite(tmp_path / "elsewhere.yaml").benchmarks == ()


def test_init_copies_everything_out_and_overwrites_nothing(tmp_path: Path) -> None:
    first = catalog.init(tmp_path / "work")
    assert {path.relative_to(tmp_path / "work").parts[0] for path in first} == set(catalog.KINDS)
    assert not [path for path in first if "__pycache__" in path.parts]
    changed, removed = tmp_path / "work/modalities/additions.py", tmp_path / "work/modalities/digit_sum.py"
    changed.write_text(BODY.format(name="additions"), encoding="utf-8")
    removed.unlink()
    assert catalog.init(tmp_path / "work") == [removed]
    assert changed.read_text(encoding="utf-8") == BODY.format(name="additions")
    assert isinstance(load_tasks(tmp_path / "work")["digit_sum"], Task)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="file: this is a file"):
        catalog.init(tmp_path / "file")
