"""How a served model is asked: the prompts of every task for every family, and what a row of results says of them."""

import json
from pathlib import Path

import benchmark_prompts
import pytest

from mmopd.config import Engine
from mmopd.config.suite import LmmsBenchmark
from mmopd.evaluate.served import VARIANTS, Served
from mmopd.evaluate.tasks import prepare, read_task
from mmopd.train.families import FAMILIES


@pytest.mark.usefixtures("server")  # imports lmms-eval
def test_every_task_asks_every_family_with_the_reviewed_prompt() -> None:
    assert benchmark_prompts.render_all() == benchmark_prompts.REVIEWED.read_text(encoding="utf-8")


def test_every_family_of_students_that_sees_has_a_name_in_lmms_eval() -> None:
    assert VARIANTS.keys() == {kind for kind, (_, name) in FAMILIES.items() if not name.endswith("ForCausalLM")}


def test_a_task_gets_the_prompts_of_the_family_where_lmms_eval_has_them(tmp_path: Path) -> None:
    mmmu = LmmsBenchmark(column="MMMU", task="mmmu_val", metric="mmmu_acc,none")
    for family, variant in (("qwen3_vl_moe", "qwen3_vl"), ("qwen2_5_vl", "default"), ("unknown", "default")):
        task = prepare(mmmu, tmp_path / family, Served(family).variant)
        assert task.variant == variant
        assert task.name == ("mmmu_val" if variant == "default" else "mmopd_mmmu_val")
    written = read_task(tmp_path / "qwen3_vl_moe" / "task.yaml")
    assert written["lmms_eval_specific_kwargs"].keys() == {"default"}
    assert written["lmms_eval_specific_kwargs"]["default"]["post_prompt"] == "Answer with the option letter only."
    assert written["test_split"] == "validation"


def test_targets_are_chosen_like_prompts(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "task: own\nmodel_specific_target_kwargs: {default: mcq, qwen3_vl: qa}\n", encoding="utf-8"
    )
    own = LmmsBenchmark(column="Own", task=str(tmp_path / "own.yaml"), metric="m")
    for variant, target in (("qwen3_vl", "qa"), ("default", "mcq")):
        task = prepare(own, tmp_path / variant, variant)
        written = read_task(tmp_path / variant / "task.yaml")["model_specific_target_kwargs"]
        assert (task.variant, written["default"]) == (variant, target)


QWEN3 = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "merge_size": 2}
QWEN2_5 = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}


@pytest.mark.parametrize(
    ("file", "images", "flags", "seen"),
    [
        ("preprocessor_config.json", QWEN3, (), (65536, 16777216, 1024)),
        ("preprocessor_config.json", QWEN2_5, (), (3136, 12845056, 784)),
        ("processor_config.json", {"image_processor": QWEN3}, (), (65536, 16777216, 1024)),
        (
            "preprocessor_config.json",
            QWEN3,
            ("--mm-processor-kwargs", '{"max_pixels": 1048576}'),
            (65536, 1048576, 1024),
        ),
        (
            "preprocessor_config.json",
            QWEN2_5,
            ('--mm-processor-kwargs={"images_kwargs": {"size": {"longest_edge": 4096, "shortest_edge": 784}}}',),
            (784, 4096, 784),
        ),
        ("preprocessor_config.json", QWEN3, ("--mm-processor-kwargs.max_pixels", "4096"), (None, None, None)),
        ("tokenizer_config.json", {}, (), (None, None, None)),
    ],
)
def test_the_pixels_of_a_row_are_those_of_the_served_folder_and_its_engine(
    tmp_path: Path, file: str, images: dict[str, object], flags: tuple[str, ...], seen: tuple[int | None, ...]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}', encoding="utf-8")
    (tmp_path / file).write_text(json.dumps(images), encoding="utf-8")
    served = Served.of(tmp_path, Engine(extra_args=flags))
    assert (served.min_pixels, served.max_pixels, served.pixels_per_token) == seen
    assert served.family == "qwen3_vl"


@pytest.mark.parametrize(
    ("flags", "defaults"),
    [
        ((), "neutral"),
        (("--max-logprobs", "64"), "neutral"),
        (("--generation-config", "auto"), "--generation-config auto"),
        (("--override-generation-config={}", "--seed=1"), "--override-generation-config {}"),
        (("--override_generation_config.top_k", "4"), "--override_generation_config.top_k 4"),
    ],
)
def test_a_row_says_which_sampling_defaults_its_server_had(
    tmp_path: Path, flags: tuple[str, ...], defaults: str
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}', encoding="utf-8")
    assert Served.of(tmp_path, Engine(extra_args=flags)).sampling_defaults == defaults
