"""Every family of students, tiny and random, through load, packing, update, export, a real vLLM server, sync and probe.

An engine that must compute in bfloat16 cannot agree within 1e-4, but it must follow each update.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from safetensors.torch import load_file
from student_worker import FAMILIES, build, plain_logprobs, plain_update, run
from train_worker import make_items
from transformers import AutoConfig, AutoModelForImageTextToText

from mmopd.config import Engine, Part, Train
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.runtime.processes import Children
from mmopd.serving.servers import Servers, serve
from mmopd.serving.specs import ServerSpec
from mmopd.train import families
from mmopd.train.families import unit
from mmopd.train.pack import Collator, Layout
from mmopd.train.students import STUDENTS, layout, load_student

SIZES = {"max_model_len": 512, "max_num_seqs": 16, "kv_cache_mib": 64}
FLOAT32 = Engine(dtype="float32", **SIZES)
BFLOAT16 = Engine(dtype="bfloat16", **SIZES, extra_args=("--no-enable-prefix-caching",))
ENGINES = {"qwen3_vl_moe": FLOAT32, "qwen2_5_vl": FLOAT32, "qwen3_5": BFLOAT16, "qwen3_5_moe": BFLOAT16}
FROZEN = {
    "qwen3_vl_moe": ["vision", "projector"],
    "qwen2_5_vl": ["language"],
    "qwen3_5": ["vision"],
    "qwen3_5_moe": ["vision", "projector"],
}
RANKS = {"qwen3_vl_moe": 2, "qwen2_5_vl": 1, "qwen3_5": 2, "qwen3_5_moe": 1}


class Found(NamedTuple):
    kind: str
    model: Path
    out: Path
    whole: dict[str, Any]  # findings of the worker if everything trains
    frozen: dict[str, Any]  # findings if FROZEN does not train


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a model of each family."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "model" for kind in ENGINES}
    for kind, folder in folders.items():
        build(kind, folder)
    return folders


@pytest.fixture(scope="module")
def servers(server: None, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Serve all of them, forked from one process."""
    specs = [ServerSpec(kind, folder, ENGINES[kind], updatable=True) for kind, folder in models.items()]
    with Children() as children, serve(specs, children, tmp_path_factory.mktemp("logs"), lambda *_: None) as servers:
        yield servers


@pytest.fixture(scope="module", params=ENGINES)
def found(models: dict[str, Path], servers: Servers, request: pytest.FixtureRequest) -> Found:
    kind = request.param
    model = models[kind]
    out = model.parent / "out"
    job = [{"train": {"gradient_checkpointing": True}}, {"train": {"freeze": FROZEN[kind]}}]
    return Found(kind, model, out, *run(model, out, job, servers[kind], ranks=RANKS[kind]))


def test_packed_log_probs_are_those_of_plain_transformers(found: Found) -> None:
    plain = plain_logprobs(AutoModelForImageTextToText.from_pretrained(found.model), Encoder(found.model))
    for result in (found.whole, found.frozen):
        assert differ(result["before"], plain) < 1e-4


def test_loss_and_gradient_norm_are_those_of_plain_transformers_on_any_number_of_ranks(found: Found) -> None:
    encoder, parts = Encoder(found.model), set(get_args(Part))
    for result, trained in ((found.whole, parts), (found.frozen, parts - set(FROZEN[found.kind]))):
        plain = AutoModelForImageTextToText.from_pretrained(found.model)
        expected = plain_update(plain, encoder, make_items(encoder, "TitIIt", 0), trained)
        assert {name: result["stats"][0][name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_an_update_moves_the_student_and_its_export_is_what_it_became(found: Found) -> None:
    for result, number in ((found.whole, "0"), (found.frozen, "1")):
        assert differ(result["before"], result["after"][0]) > 1e-2
        model, report = AutoModelForImageTextToText.from_pretrained(
            found.out / number / "export", output_loading_info=True
        )
        assert not any(report.values())
        assert differ(result["after"][-1], plain_logprobs(model, Encoder(found.model))) < 1e-4


def test_the_engine_serves_the_folder_and_follows_every_update(found: Found) -> None:
    for result in (found.whole, found.frozen):
        if ENGINES[found.kind].dtype == "float32":
            assert max(result["gaps"]) < 1e-4
        assert max(result["gaps"]) < 0.25 * min(result["unsynced"])  # also in bfloat16


def test_weights_are_sent_as_the_folder_has_them(found: Found) -> None:
    stored = load_file(found.model / "model.safetensors")
    exported = load_file(found.out / "0" / "export" / "model.safetensors")
    assert found.whole["sent"] == [stored.keys(), stored.keys()]
    assert {name: w.shape for name, w in exported.items()} == {name: w.shape for name, w in stored.items()}


def test_what_is_frozen_stays_bit_for_bit_and_is_sent_once(found: Found) -> None:
    stored, exported = (
        load_file(found.model / "model.safetensors"),
        load_file(found.out / "1" / "export" / "model.safetensors"),
    )
    trained = {name for name in stored if part_of(name) not in FROZEN[found.kind]}
    assert {name for name in stored if not torch.equal(stored[name], exported[name])} <= trained
    assert all(torch.equal(exported[name], stored[name]) for name in stored.keys() - trained)
    first, later = found.frozen["sent"]
    assert first == stored.keys()
    assert trained <= later
    assert {unit(name) for name in later} == {unit(name) for name in trained}
    assert len(later) < 0.9 * len(first)


def test_what_is_frozen_has_no_optimiser_state_and_no_backward_pass(found: Found) -> None:
    numbers = {name: w.numel() for name, w in load_file(found.model / "model.safetensors").items()}
    trained = sum(n for name, n in numbers.items() if part_of(name) not in FROZEN[found.kind])
    ranks = RANKS[found.kind]
    assert found.whole["state"] == pytest.approx(
        2 * sum(numbers.values()) / ranks, rel=2e-3
    )  # AdamW's two moments; padding
    assert found.frozen["state"] == pytest.approx(2 * trained / ranks, rel=1e-2)
    assert found.whole["ran"].keys() == {"vision", "projector", "language"}
    if "vision" in FROZEN[found.kind]:
        assert "vision" not in found.frozen["ran"]
    if "projector" in FROZEN[found.kind]:
        assert "projector" not in found.frozen["ran"]


def test_everything_frozen_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing would train"):
        Train(freeze=("language", "vision", "projector"))
    with pytest.raises(ValueError, match="with `lora` all of the model's own weights are frozen already"):
        Train.model_validate({"freeze": ["vision"], "lora": {}})


def test_every_family_has_a_student_and_another_one_is_refused_by_name(tmp_path: Path) -> None:
    assert STUDENTS.keys() == FAMILIES.keys()
    AutoConfig.for_model("llava").save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"no student class for model_type 'llava'; known: qwen3_vl \(Qwen3-VL\), .*qwen3_5_moe"
    ):
        load_student(tmp_path, torch.float32)


def test_linear_attention_would_mix_the_samples_of_a_row(tmp_path: Path) -> None:
    build("qwen3_5", tmp_path)
    student, encoder = load_student(tmp_path, torch.float32), Encoder(tmp_path)
    plain = torch.cat(plain_logprobs(student, encoder))
    items = make_items(encoder, "TiI", 7)
    assert layout(student) == "alone"
    ways: tuple[tuple[Layout, float, float], ...] = (("alone", 0.0, 1e-5), ("masked", 0.1, 10.0))
    for way, low, high in ways:
        collate = Collator(encoder, student.model.get_rope_index, 3 * 2 * 16 * 16, 2, way)
        micro = collate(items, range(len(items)))
        order = torch.cat(
            [torch.arange(len(items[i].tokens)) + sum(len(item.tokens) for item in items[:i]) for i in micro.order]
        )
        with torch.no_grad():
            assert low <= (student(**micro.inputs) - plain[order]).abs().max() < high


def part_of(name: str) -> str:
    """Return the part of a parameter by its name in a checkpoint; Qwen2.5-VL's names lack the first word."""
    return families.part_of(f"model.{name}" if name.startswith("visual.") else name)


def differ(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Return the largest difference of two lists of log-probs."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
