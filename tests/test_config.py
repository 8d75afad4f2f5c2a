"""Recipes: which settings are refused, and with which message."""

from pathlib import Path

import pytest

from mmopd import settings_file
from mmopd.algorithm.settings import Margin
from mmopd.config import Fleet, Mixture, Recipe
from mmopd.errors import UserError

RECIPE = "student: {model: m}\nfleet: teachers/demo.yaml\nmixture: data/demo.yaml\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian: {steps: 3}", "unknown key 'trian'; did you mean 'train'?"),
        ("train: {stpes: 3}", "unknown key 'train.stpes'; did you mean 'steps'?"),
        ("algorithm: {margin: {detla: 1}}", "unknown key 'algorithm.margin.detla'; did you mean 'delta'?"),
        ("train: {steps: 0}", "train.steps: has to be greater than or equal to 1"),
        ("algorithm: {margin: {delta: -1}}", "algorithm.margin.delta: has to be greater than or equal to 0"),
        ("algorithm: {margin: {delta: .inf}}", "algorithm.margin.delta: has to be a finite number"),
        ("algorithm: {margin: {delta: .nan}}", "algorithm.margin.delta: has to be"),
        (
            "algorithm: {margin: {kind: mask, retain: 1.5}}",
            "algorithm.margin.retain: has to be less than or equal to 1",
        ),
        (
            "algorithm: {margin: {kind: mask, retain: -1}}",
            "algorithm.margin.retain: has to be greater than or equal to 0",
        ),
        ("algorithm: {margin: {kind: both}}", "algorithm.margin.kind: has to be 'shift' or 'mask'"),
        ("algorithm: {margin: {kind: [shift, mask]}}", "algorithm.margin.kind: has to be 'shift' or 'mask'"),
        (
            "algorithm: {margin: [{kind: shift}, {kind: mask}]}",
            "one calibration at a time: `kind: shift` or `kind: mask`",
        ),
        ("algorithm: {margin: {shift: {delta: 1}, mask: {}}}", "one calibration at a time"),
        ("algorithm: {margin: {kind: mask, direction: spread}}", "set algorithm.margin.direction=null"),
        (
            "algorithm: {margin: {kind: shift, retain: 0.25}}",
            "`retain` is a setting of `kind: mask`, and the kind is shift: leave it out",
        ),
        ("algorithm: {margin: {retain: 0.5}}", "set algorithm.margin.retain=null"),
        ("algorithm: {margin: {mode: median}}", "algorithm.margin.mode: has to be 'mean' or 'minmax'"),
        ("algorithm: {balance: {ratio: -1}}", "algorithm.balance.ratio: has to be greater than or equal to 0"),
        ("algorithm: {balance: {ratio: -.inf}}", "algorithm.balance.ratio: has to be greater than or equal to 0"),
        ("algorithm: {balance: {ratio: .nan}}", "algorithm.balance.ratio: has to be greater than or equal to 0"),
        (
            "algorithm: {balance: {tolerance: 2}}",
            "algorithm.balance.tolerance: has to be less than or equal to 1",
        ),
        ("algorithm: {balance: {scope: global}}", "algorithm.balance.scope: has to be 'group' or 'batch'"),
        ("algorithm: {outcome_threshold: 0}", "algorithm.outcome_threshold: has to be greater than 0"),
        ("algorithm: {log_ratio_clip: .nan}", "algorithm.log_ratio_clip: has to be a finite number, found nan"),
        ("rollout: {group: 65}", "rollout.group is 65, and student.engine.max_num_seqs is 64"),
        ("student: [", "not valid YAML"),
    ],
)
def test_a_mistake_names_the_file_the_key_and_the_way_out(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, RECIPE + text)
    with pytest.raises(UserError) as error:
        settings_file.read(Recipe, path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_missing_recipe_and_one_that_is_a_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        settings_file.read(Recipe, tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"expected keys and values, .*found a list"):
        settings_file.read(Recipe, write(tmp_path, "- a"))


def test_overrides_replace_values_and_switch_parts_off(tmp_path: Path) -> None:
    recipe = settings_file.read(
        Recipe, write(tmp_path, RECIPE), ["train.steps=3", "algorithm.margin=null", "algorithm.balance.ratio=2"]
    )
    assert recipe.train.steps == 3
    assert recipe.algorithm.margin is None
    assert recipe.algorithm.balance is not None
    assert recipe.algorithm.balance.ratio == 2


def test_an_engine_that_shares_the_trainers_gpu_is_the_only_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ipc is for one engine, .* set replicas: 1, or sync: broadcast"):
        settings_file.read(Recipe, write(tmp_path, RECIPE), ["student.sync=ipc", "student.replicas=2"])


@pytest.mark.parametrize("override", ["train.steps", "student.model.x=1"])
def test_an_override_that_makes_no_sense_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"override|has no keys"):
        settings_file.read(Recipe, write(tmp_path, RECIPE), [override])


@pytest.mark.parametrize(
    "override",
    ["algorithm.balance.ratio=.inf", "algorithm.balance.ratio=0", "algorithm.margin={kind: mask, retain: 0}", "seed=7"],
)
def test_a_resolved_recipe_reads_back_as_itself(tmp_path: Path, override: str) -> None:
    recipe = settings_file.read(Recipe, write(tmp_path, RECIPE), [override])
    assert settings_file.read(Recipe, write(tmp_path, settings_file.dump(recipe))) == recipe


def test_the_setting_of_the_other_kind_of_margin_can_be_taken_out_as_the_message_says(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE + "algorithm: {margin: {kind: shift, direction: lift, delta: 0.1}}")
    with pytest.raises(UserError, match=r"r\.yaml: algorithm\.margin: .*the kind is mask"):
        settings_file.read(Recipe, path, ["algorithm.margin.kind=mask"])
    recipe = settings_file.read(Recipe, path, ["algorithm.margin.kind=mask", "algorithm.margin.direction=null"])
    assert recipe.algorithm.margin == Margin(kind="mask", delta=0.1)
    assert "direction" not in settings_file.dump(recipe)


def test_a_route_to_no_teacher_a_teacher_of_two_kinds_and_weights_of_zero_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no teacher 'txt'; did you mean 'text'"):
        settings_file.read(Fleet, write(tmp_path, "teachers: {text: {model: m}}\nroutes: [{teacher: txt}]"))
    with pytest.raises(UserError, match="either `model`"):
        settings_file.read(Fleet, write(tmp_path, "teachers: {text: {}}\nroutes: [{teacher: text}]"))
    with pytest.raises(UserError, match="sum to zero"):
        settings_file.read(Mixture, write(tmp_path, "sources: {a: {shards: s, task: t, weight: 0}}"))
