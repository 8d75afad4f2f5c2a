"""LoRA on two ranks with a real vLLM server that knows nothing of adapters, and the exported folder."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from student_worker import build, plain_logprobs, run
from transformers import AutoModelForImageTextToText

from mmopd.config import Engine, Lora
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.runtime.processes import Children
from mmopd.serving.lora import read_adapter
from mmopd.serving.servers import serve
from mmopd.serving.specs import ServerSpec
from mmopd.train.lora import add_adapters, weights
from mmopd.train.students import load_student

LANGUAGE = {"train": {"lr": 1e-2, "lora": {"rank": 4, "alpha": 8}}}
EVERYWHERE = {"train": {"lr": 1e-2, "lora": {"rank": 2, "parts": ["vision", "projector", "language"]}}}
TOUCHED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Found(NamedTuple):
    model: Path
    out: Path
    language: dict[str, Any]
    resumed: dict[str, Any]
    everywhere: dict[str, Any]


@pytest.fixture(scope="module")
def found(server: None, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("lora")
    build("qwen3_vl", folder / "model")
    job = [LANGUAGE, LANGUAGE | {"resume": "0"}, EVERYWHERE]
    engine = Engine(dtype="float32", max_model_len=512, max_num_seqs=16, kv_cache_mib=64)
    student = ServerSpec("student", folder / "model", engine, updatable=True)
    with Children() as children, serve([student], children, folder, lambda *event: None) as servers:
        results = run(folder / "model", folder / "out", job, servers["student"], ranks=2)
    return Found(folder / "model", folder / "out", *results)


def test_new_adapters_change_nothing_and_updates_do(found: Found) -> None:
    plain = plain_logprobs(AutoModelForImageTextToText.from_pretrained(found.model), Encoder(found.model))
    for result in (found.language, found.everywhere):
        assert differ(result["before"], plain) < 1e-4
        assert differ(result["before"], result["after"][1]) > 1e-2


def test_the_engine_holds_the_merged_weights_after_every_update(found: Found) -> None:
    for result in (found.language, found.everywhere):
        assert len(result["gaps"]) == 3
        assert max(result["gaps"]) < 1e-4
        assert min(result["unsynced"]) > 1e-2


def test_only_adapters_have_optimiser_state_and_only_what_they_touch_is_sent_again(found: Found) -> None:
    stored = load_file(found.model / "model.safetensors")
    touched = {name for name in stored if name.split(".")[-2] in TOUCHED}
    assert found.language["state"] == pytest.approx(
        2 * sum(4 * sum(stored[name].shape) for name in touched) / 2, rel=0.01
    )  # on one rank
    first, later = found.language["sent"]
    assert first == stored.keys()
    assert touched <= later
    assert {name.rpartition(".layers.")[2].split(".")[1] for name in later} == {"self_attn", "mlp"}
    assert not any("visual" in name or "embed" in name for name in later)


def test_the_base_is_unchanged_bit_for_bit(found: Found) -> None:
    stored = load_file(found.model / "model.safetensors")
    for result in (found.language, found.everywhere):
        assert {
            name: torch.equal(w, stored[name]) for name, w in result["kept"].items() if "lora_" not in name
        } == dict.fromkeys(stored, True)


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(found: Found) -> None:
    strip = [
        {k: v for k, v in stats.items() if k != "seconds"}
        for stats in (found.language["stats"][2], found.resumed["stats"][0])
    ]
    assert strip[0] == strip[1]
    assert all(map(torch.equal, found.language["after"][2], found.resumed["after"][0]))


@pytest.mark.parametrize(("number", "rank", "vision"), [("0", 4, False), ("2", 2, True)])
def test_the_export_is_the_merged_model_and_an_adapter_that_peft_and_a_fleet_load(
    found: Found, number: str, rank: int, vision: bool
) -> None:
    folder, encoder = found.out / number / "export", Encoder(found.model)
    trained = (found.language if number == "0" else found.everywhere)["after"][2]
    merged, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert differ(trained, plain_logprobs(merged, encoder)) < 1e-4
    base = AutoModelForImageTextToText.from_pretrained(found.model)
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    assert differ(trained, plain_logprobs(adapted, encoder)) < 1e-4
    adapter = read_adapter(folder / "adapter")
    assert (adapter.rank, adapter.vision) == (rank, vision)
    assert set(TOUCHED) <= adapter.modules
    assert adapted.peft_config["default"].base_model_name_or_path == str(found.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_that_of_peft(tmp_path: Path, dtype: torch.dtype) -> None:
    build("qwen3_5", tmp_path)
    student = load_student(tmp_path, dtype)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    add_adapters(
        student, Lora(rank=3, alpha=5, parts=("projector", "language"), targets=("linear_fc1", "in_proj_qkv", "q_proj"))
    )
    for name, p in student.named_parameters():
        assert p.dtype == dtype
        if ".lora_B." in name:
            torch.nn.init.normal_(p.data)
    ours = {weight.name: weight.value() for weight in weights(student)}
    assert ours.keys() == before.keys()
    layers = {name: layer for name, layer in student.named_modules() if isinstance(layer, LoraLayer)}
    assert {name.rpartition(".")[2] for name in layers} == {"linear_fc1", "in_proj_qkv", "q_proj"}
    for name, layer in layers.items():
        layer.merge()
        close = (
            {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
        )  # peft also rounds B A
        torch.testing.assert_close(ours[f"{name}.weight"], layer.base_layer.weight.data, **close)
    assert {name for name in before if not torch.equal(ours[name], before[name])} == {
        f"{name}.weight" for name in layers
    }


def test_a_target_that_no_layer_is_named_is_refused(tmp_path: Path) -> None:
    build("qwen2_5_vl", tmp_path)
    with pytest.raises(UserError, match="no linear layer 'qkv' in language; there is down_proj, gate_proj, k_proj"):
        add_adapters(load_student(tmp_path, torch.float32), Lora(targets=("q_proj", "qkv")))


def differ(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Return the largest difference of two lists of log-probs."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
