"""Updates that cannot be made: skipped, kept, and recomputed by `mmopd replay`."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from train_worker import TRAIN, launch, make_items

from mmopd.commands.replay import replay
from mmopd.config import Recipe, Rollout, Student
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.runtime.run_folder import RunFolder
from mmopd.train.prefix_tree import Item
from mmopd.train.skipped_batch import read_batch, write_batch


@pytest.fixture(scope="module")
def guarded(server: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, dict[str, Any]]:
    run = RunFolder(tmp_path_factory.mktemp("guarded") / "run")
    student = Student.model_validate({"model": str(model)})
    run.create(
        Recipe(student=student, fleet=Path("none.yaml"), mixture=Path("none.yaml"), rollout=Rollout(), train=TRAIN)
    )
    return run, launch(model, run.root, "guarded", 2)


def test_updates_that_are_not_finite_are_skipped_and_the_others_made(guarded: tuple[RunFolder, dict[str, Any]]) -> None:
    _, found = guarded
    assert found["made"] == [2, 1, 0]
    assert found["state"] == [False, False, False, True, True, True, True]


def test_a_run_stops_when_it_skips_too_many_and_says_what_to_look_at(guarded: tuple[RunFolder, dict[str, Any]]) -> None:
    run, found = guarded
    assert "step 3: the loss is nan; 4 of the last 7 updates were skipped" in found["stopped"]
    assert f"`mmopd replay {run.root} 3`" in found["stopped"]
    assert sorted(path.name for path in run.replay.iterdir()) == ["step-00000001", "step-00000002", "step-00000003"]


def test_replay_shows_the_response_whose_advantage_is_infinite(guarded: tuple[RunFolder, dict[str, Any]]) -> None:
    run, _ = guarded
    console = Console(record=True, width=200)
    found = replay(run, 1, console)
    assert [one.finite for one in found] == [False, *[True] * (len(found) - 1)]
    assert found[0].wrong == {"advantage": [1]}
    assert found[0].item.encoded.prompt.key == "T/3-0"
    said = console.export_text()
    assert "step 1: the loss is -inf. 3 responses" in said
    assert "advantage of 1, the first at 1 '" in said
    assert "1 of 3 responses are not finite" in said


def test_replay_computes_what_the_update_has_computed(guarded: tuple[RunFolder, dict[str, Any]]) -> None:
    run, found = guarded
    whole = [one for one in replay(run, 1, Console(quiet=True)) if one.finite]
    expected = dict(zip(found["tokens"], found["logprobs"], strict=True))
    for one in whole:
        torch.testing.assert_close(one.logprob, expected[one.item.tokens], rtol=1e-5, atol=1e-5)


def test_replay_names_a_weight_that_is_not_finite(guarded: tuple[RunFolder, dict[str, Any]]) -> None:
    run, _ = guarded
    console = Console(record=True, width=200)
    assert not any(one.finite for one in replay(run, 2, console))
    assert (
        "1 weights of the student are not finite, such as model.language_model.layers.0.mlp.down_proj.weight"
        in console.export_text()
    )


def test_a_step_that_was_not_skipped_is_an_error_that_lists_those_that_were(
    guarded: tuple[RunFolder, dict[str, Any]],
) -> None:
    run, _ = guarded
    with pytest.raises(UserError, match="no skipped update of step 7 is saved; saved steps: 1, 2, 3"):
        replay(run, 7, Console(quiet=True))


def test_a_batch_comes_back_as_it_was_with_images_and_every_field(model: Path, tmp_path: Path) -> None:
    items = make_items(Encoder(model), "TiI", 7)
    top = (torch.tensor([[1, 2]] * len(items[0].tokens)), torch.zeros(len(items[0].tokens), 2))
    items[0] = Item(**{f.name: getattr(items[0], f.name) for f in fields(Item)} | {"likeliest": top})
    write_batch(tmp_path, items, step=7, reason="a test")
    back, about = read_batch(tmp_path)
    assert about == {"step": 7, "reason": "a test"}
    for one, other in zip(items, back, strict=True):
        assert one.encoded == other.encoded
        for field in fields(Item):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert str(a) == str(b), field.name
    assert back[0].encoded is back[1].encoded  # they share a prompt


@pytest.mark.parametrize("name", ["batch.json", "batch.safetensors"])
def test_a_batch_that_is_not_whole_is_an_error_that_names_its_folder(model: Path, tmp_path: Path, name: str) -> None:
    write_batch(tmp_path, make_items(Encoder(model), "t", 7), step=7, reason="a test")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20])
    with pytest.raises(UserError, match=str(tmp_path)):
        read_batch(tmp_path)
