"""GPUs that are too few are found before anything is started; the number of GPUs is faked where it is read."""

from pathlib import Path

import pytest
from rich.console import Console

from mmopd import catalog
from mmopd.commands.train import launch
from mmopd.config import Engine, Recipe
from mmopd.errors import ConfigError
from mmopd.runtime.run_folder import RunFolder
from mmopd.serving import placement
from mmopd.serving.placement import assign_gpus, check_gpus
from mmopd.serving.specs import ServerSpec


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Return a recipe with two ranks."""
    return catalog.load_recipe("recipes/demo.yaml", overrides=["train.ranks=2"])


def with_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(placement, "count_gpus", lambda: number)


def but(recipe: Recipe, **student: object) -> Recipe:
    return recipe.model_copy(update={"student": recipe.student.model_copy(update=student)})


def test_more_ranks_than_gpus_are_refused_and_nothing_is_started(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with_gpus(monkeypatch, 1)
    with pytest.raises(ConfigError, match=r"train\.ranks is 2, .* 1 GPU, .* set train\.ranks=1, .* --launcher"):
        launch(RunFolder(tmp_path / "run"), recipe, Console(quiet=True))
    assert not list(tmp_path.iterdir())
    check_gpus(recipe, elsewhere=True)
    for number in (0, 2):
        with_gpus(monkeypatch, number)
        check_gpus(recipe, elsewhere=False)


def test_broadcast_between_processes_that_share_a_gpu_is_refused(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(monkeypatch, 1)
    with pytest.raises(ConfigError, match=r"student\.sync: broadcast needs 2 GPUs, .* student\.sync=file, or ipc"):
        check_gpus(but(recipe, sync="broadcast"), elsewhere=True)
    with_gpus(monkeypatch, 2)
    check_gpus(but(recipe, sync="broadcast"), elsewhere=False)
    with pytest.raises(ConfigError, match="needs 3 GPUs, one for rank 0 and 2 for the student's engines"):
        check_gpus(but(recipe, sync="broadcast", replicas=2), elsewhere=False)
    check_gpus(but(recipe, sync="ipc"), elsewhere=False)
    check_gpus(but(recipe, replicas=4), elsewhere=False)


def test_a_server_that_is_split_over_more_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def spec(split: int) -> ServerSpec:
        return ServerSpec("math.0", Path("m"), Engine(tensor_parallel=split), updatable=False)

    assert assign_gpus([spec(2)]) == {"math.0": "1,0"}
    with pytest.raises(ConfigError, match=r"engine\.tensor_parallel of server 'math\.0' is 4, .* 2 GPUs"):
        assign_gpus([spec(4)])
