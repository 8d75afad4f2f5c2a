"""Adapters that bind to nothing are refused: by the names and shapes of their model before the start, and by their
scores in the preflight.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM
from safetensors.torch import load_file, save_file
from student_worker import FAMILIES, SEEING, build

from mmopd.capacity.weights import check_model
from mmopd.config import Engine, Fleet, Lora
from mmopd.errors import CheckpointError
from mmopd.modality import Encoder
from mmopd.preflight.check import Check
from mmopd.preflight.run import preflight
from mmopd.runtime.processes import Children
from mmopd.serving.adapted_model import RENAMED, check_adapters
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.lora import PREFIX, lora_flags, read_adapter
from mmopd.serving.servers import serve
from mmopd.serving.specs import ServerSpec
from mmopd.train.lora import add_adapters, save_adapter
from mmopd.train.students import load_student

TEXT_CLASS = "model.layers."
VL_CLASS = "model.language_model.layers."
MOE = ("qwen3_vl_moe", "qwen3_5_moe", "qwen3_moe")


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Return the folder of a tiny random student of each family."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in FAMILIES}
    for kind, folder in folders.items():
        build(kind, folder)
    return folders


def export(model: Path, folder: Path, **lora: Any) -> Path:
    """Write the adapter that `train.lora` exports, with random weights."""
    student, settings = load_student(model, torch.float32), Lora(rank=2, alpha=64, **lora)
    add_adapters(student, settings)
    for name, p in student.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p.data)
    save_adapter(student, settings, model, folder, write=True)
    return folder


def changed(source: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Write a copy of an adapter with other tensors."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    save_file(change(load_file(source / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


def renamed(source: Path, folder: Path, old: str, new: str) -> Path:
    return changed(source, folder, lambda tensors: {name.replace(old, new): t for name, t in tensors.items()})


def refusal(adapter: Path, model: Path, *, cpu: bool = False) -> str:
    with pytest.raises(CheckpointError) as error:
        check_adapters({"a.0": read_adapter(adapter)}, model, cpu=cpu)
    return str(error.value)


@pytest.fixture(scope="module")
def exported(students: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(students["qwen3_vl"], tmp_path_factory.mktemp("exported") / "adapter")


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_training_exports_passes_the_check_in_every_family(
    kind: str, students: Mapping[str, Path], tmp_path: Path
) -> None:
    adapter = read_adapter(export(students[kind], tmp_path / "a", parts=("vision", "projector", "language")))
    assert adapter.vision == (kind in SEEING)
    assert len(adapter.layers) > 5
    check_adapters({"a.0": adapter}, students[kind], cpu=False)
    if kind in MOE:
        said = refusal(tmp_path / "a", students[kind], cpu=True)
        assert "without a GPU" in said
        assert "merge the adapter into its model" in said
    else:
        check_adapters({"a.0": adapter}, students[kind], cpu=True)


@pytest.mark.parametrize("kind", SEEING)
def test_names_of_the_text_class_are_taken_where_vllm_takes_them_and_refused_elsewhere(
    kind: str, students: Mapping[str, Path], tmp_path: Path
) -> None:
    text = renamed(export(students[kind], tmp_path / "a"), tmp_path / "text", VL_CLASS, TEXT_CLASS)
    if kind == "qwen2_5_vl":
        check_adapters({"a.0": read_adapter(text)}, students[kind], cpu=True)
        return
    said = refusal(text, students[kind])
    first = next(iter(read_adapter(text).layers))
    assert f"'{PREFIX}{first}' is no linear layer" in said
    assert f"The model calls it {first.replace(TEXT_CLASS, VL_CLASS)!r}" in said


def test_a_published_qwen2_5_vl_with_old_names_takes_adapters_of_new_and_old_names(
    students: Mapping[str, Path], tmp_path: Path
) -> None:
    """Published checkpoints have `model.layers` and `visual`; transformers trains with other names."""
    new = export(students["qwen2_5_vl"], tmp_path / "new", parts=("vision", "projector", "language"))
    (old := tmp_path / "old").mkdir()
    (old / "config.json").write_bytes((students["qwen2_5_vl"] / "config.json").read_bytes())
    weights = load_file(students["qwen2_5_vl"] / "model.safetensors")
    short = {
        n.replace("model.visual.", "visual.").replace("model.language_model.", "model."): w for n, w in weights.items()
    }
    save_file(short, old / "model.safetensors")
    check_adapters({"a.0": read_adapter(new)}, old, cpu=True)
    before = renamed(new, tmp_path / "before", "model.model.visual.", "model.visual.")
    adapter = read_adapter(before)
    assert adapter.vision
    check_adapters({"a.0": adapter}, students["qwen2_5_vl"], cpu=True)
    flags = lora_flags({"a.0": adapter})
    assert "visual.merger.mlp.0" in flags  # "0" alone would select every list's first module
    assert "0" not in flags[flags.index("--lora-target-modules") :]


def test_half_of_the_layers_unknown_is_refused_with_their_number(
    exported: Path, students: Mapping[str, Path], tmp_path: Path
) -> None:
    said = refusal(renamed(exported, tmp_path / "a", "layers.1.", "layers.7."), students["qwen3_vl"])
    assert "layers.7." in said
    assert "7 of 14 modules" in said
    assert "nearest is 'model.language_model.layers." in said


@pytest.mark.parametrize(
    "name",
    ["model.language_model.embed", "model.visual.pos_embed", "model.language_model.layers.0.input_layernorm", "q_proj"],
)
def test_what_is_no_linear_layer_is_refused(
    name: str, exported: Path, students: Mapping[str, Path], tmp_path: Path
) -> None:
    first = next(iter(read_adapter(exported).layers))
    assert name in refusal(renamed(exported, tmp_path / "a", first, name), students["qwen3_vl"])


def test_another_shape_is_refused_with_both(exported: Path, students: Mapping[str, Path], tmp_path: Path) -> None:
    wide = changed(
        exported,
        tmp_path / "a",
        lambda t: {n: w.repeat(1, 2) if n.endswith("down_proj.lora_A.weight") else w for n, w in t.items()},
    )
    said = refusal(wide, students["qwen3_vl"])
    assert "[out, in] = [64, 256]" in said
    assert "has [64, 128]" in said


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("how", ["missing", "rank"])
def test_a_pair_that_does_not_fit_is_refused(part: str, how: str, exported: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = next(name for name in tensors if part in name)
        if how == "missing":
            del tensors[name]
        else:
            tensors[name] = torch.zeros(3, 3)
        return tensors

    with pytest.raises(CheckpointError, match=r"needs \[rank, in\] and \[out, rank\]"):
        read_adapter(changed(exported, tmp_path / "a", change))


def test_names_come_from_the_index_and_a_missing_or_broken_shard_is_named(
    exported: Path, students: Mapping[str, Path], tmp_path: Path
) -> None:
    weights = load_file(students["qwen3_vl"] / "model.safetensors")
    halves = [dict(list(weights.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        save_file(half, tmp_path / f"model-{i}.safetensors")
    index = {name: f"model-{i}.safetensors" for i, half in enumerate(halves) for name in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    (tmp_path / "config.json").write_bytes((students["qwen3_vl"] / "config.json").read_bytes())
    check_adapters({"a.0": read_adapter(exported)}, tmp_path, cpu=True)
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 20)
    assert "model-1.safetensors: not a safetensors file" in refusal(exported, tmp_path)
    (tmp_path / "model-1.safetensors").unlink()
    assert "model-1.safetensors" in refusal(exported, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]", encoding="utf-8")
    assert "expected a JSON object" in refusal(exported, tmp_path)


def test_adapters_of_experts_are_refused_everywhere(students: Mapping[str, Path], tmp_path: Path) -> None:
    adapter = export(students["qwen3_vl_moe"], tmp_path / "a", targets=("q_proj",))
    experts = renamed(adapter, tmp_path / "b", "self_attn.q_proj", "mlp.experts.0.gate_proj")
    assert "no adapters of experts" in refusal(experts, students["qwen3_vl_moe"])


# In the preflight


class WithAdapter(FakeVLLM):
    """A fake server with an adapter `tiny` over the model `base`, which it may not list, or may not change."""

    def __init__(self, encoder: Encoder, *, bound: bool = True, listed: bool = True) -> None:
        super().__init__(encoder)
        self.bound, self.listed = bound, listed

    def _reply(
        self, line: str, headers: dict[str, str], request: dict[str, Any], fault: str | None
    ) -> tuple[int, bytes]:
        asked = {**request, "model": "tiny"} if request.get("model") == "base" else request
        status, body = super()._reply(line, headers, asked, fault)
        reply = json.loads(body)
        if line.startswith("GET /v1/models"):
            base = [{"id": "base", "max_model_len": 2048}] if self.listed else []
            return status, json.dumps({"data": [*base, {"id": "tiny", "parent": "base"}]}).encode()
        if self.bound and request.get("model") == "base" and "prompt_logprobs" in reply:
            for row in reply["prompt_logprobs"]:
                for entry in (row or {}).values():
                    entry["logprob"] -= 1.0
        return status, json.dumps(reply).encode()


def examine(encoder: Encoder, *servers: tuple[str, Endpoint]) -> dict[str, Check]:
    teachers = {name: {"endpoints": ["http://t"]} for name, _ in servers}
    fleet = Fleet.model_validate({"teachers": teachers, "routes": []})
    endpoints = {name: [endpoint] for name, endpoint in servers}
    checks = asyncio.run(preflight(fleet, {}, endpoints, encoder, [], max_tokens=8))
    return {check.of: check for check in checks if check.name == "adapter"}


def ask(encoder: Encoder, **settings: bool) -> Check:
    async def main() -> list[Check]:
        async with WithAdapter(encoder, **settings) as server:
            fleet = Fleet.model_validate({"teachers": {"t": {"endpoints": ["http://t"]}}, "routes": []})
            return await preflight(fleet, {}, {"t": [server.endpoint]}, encoder, [], max_tokens=8)

    return next(check for check in asyncio.run(main()) if check.name == "adapter")


def test_an_adapter_that_changes_no_score_fails_the_preflight(encoder: Encoder) -> None:
    assert ask(encoder).state == "ok"
    unbound = ask(encoder, bound=False)
    assert unbound.state == "fail"
    assert "have the scores of 'base' without it" in unbound.found
    assert unbound.way_out
    hidden = ask(encoder, listed=False)
    assert hidden.state == "warn"
    assert "does not list 'base'" in hidden.found


# With a real server


def test_a_real_server_names_adapters_as_the_check_does_and_the_preflight_tells_one_that_does_nothing(
    server: None, model: Path, encoder: Encoder, tmp_path: Path
) -> None:
    right = export(model, tmp_path / "right")
    nothing = changed(right, tmp_path / "nothing", lambda tensors: {n: torch.zeros_like(t) for n, t in tensors.items()})
    adapters = {"right": read_adapter(right), "nothing": read_adapter(nothing)}
    engine = Engine(dtype="float32", max_model_len=512, max_num_seqs=16, kv_cache_mib=64)
    (logs := tmp_path / "logs").mkdir()
    spec = ServerSpec("base", model, engine, updatable=False, adapters=adapters)
    with Children() as children, serve([spec], children, logs, lambda *event: None) as servers:
        checks = examine(encoder, *servers.items())
    assert (checks["right"].state, checks["nothing"].state) == ("ok", "fail")
    assert_prefixes_are_those_of_vllm()


def assert_prefixes_are_those_of_vllm() -> None:
    from vllm.model_executor.models import ModelRegistry

    for architecture, prefixes in RENAMED.items():
        kind = ModelRegistry._try_load_model_cls(architecture)
        assert kind is not None, architecture
        theirs = kind.hf_to_vllm_mapper.get_rename_mapper()
        for name in (f"{VL_CLASS}0.a", f"{TEXT_CLASS}0.a", "model.visual.blocks.0.a", "visual.a", "lm_head.a"):
            ours = next((new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name)
            if name != "lm_head.a":  # refused before names are compared
                assert ours == theirs._map_name(name), (architecture, name)


def test_the_folder_of_every_family_fits_its_configuration(students: Mapping[str, Path], tmp_path: Path) -> None:
    for kind, folder in students.items():
        check_model(folder)
        weights = load_file(folder / "model.safetensors")
        name = next(name for name in weights if name.endswith("layers.0.input_layernorm.weight"))
        copy = tmp_path / kind
        copy.mkdir()
        (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
        save_file(weights | {name: torch.ones(3)}, copy / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"the tensor '{name}' has the shape \\[3\\]"):
            check_model(copy)
