"""A model folder from anybody: its code is never run, its weights are checked before a process starts, by name."""

import ast
import importlib.util
import inspect
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import mmopd
from mmopd.capacity.model_size import build, read_model
from mmopd.capacity.weights import check_model
from mmopd.commands.merge import merge
from mmopd.config import Engine
from mmopd.errors import CheckpointError
from mmopd.modality import Encoder
from mmopd.model_folder import INDEX, check_finite, is_finite, load_config
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.serving.servers import serve
from mmopd.serving.specs import ServerSpec, to_server
from mmopd.teacher.router import check_tokenizers
from mmopd.train.students import load_student

HERE = Path(__file__).parent.parent
CODE = {"AutoConfig": "mine.C", "AutoTokenizer": ["mine.T", None], "AutoProcessor": "mine.P", "AutoModel": "mine.M"}
ELSEWHERE = {"AutoConfig": "somebody/somewhere--mine.C"}


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """Return a copy of the demo's student, with Python code that says that it was run."""
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    (copy / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nT = P = M = C\n", encoding="utf-8"
    )
    return copy


def change(path: Path, **values: Any) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(known | values), encoding="utf-8")


def serve_it(folder: Path) -> None:
    with Children() as children, serve([ServerSpec("a", folder, Engine(), False)], children, folder, print):
        pass


def merge_it(folder: Path) -> None:
    with Stages(Console(quiet=True)) as stages, stages.stage("merge") as stage:
        merge(folder, {folder: 1.0}, 1.0, folder.parent / "out", stage)


LOADERS: dict[str, Callable[[Path], object]] = {
    "check": check_model,
    "encoder": Encoder,
    "student": lambda folder: load_student(folder, torch.float32),
    "tokenizer": lambda folder: check_tokenizers(folder, {}),
    "plan": read_model,
    "plan of another class": build,
    "configuration": load_config,
    "serve": serve_it,
    "merge": merge_it,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_no_code_of_a_folder_is_run(folder: Path, tmp_path: Path, loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    change(folder / "config.json", auto_map=CODE, model_type="mine")
    change(folder / "tokenizer_config.json", auto_map=CODE)
    with pytest.raises(CheckpointError, match=r"(?s)config.json: auto_map names Python code .* remove the key"):
        LOADERS[loader](folder)
    assert not (tmp_path / "ran").exists()
    assert sys.stdin.read() == "y\n" * 20


@pytest.mark.parametrize("code", [CODE, ELSEWHERE, "mine.C", ["mine.C", None]])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer_config.json",
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "generation_config.json",
    ],
)
def test_the_file_and_the_key_are_named(folder: Path, name: str, code: Any) -> None:
    change(folder / name, auto_map=code)
    with pytest.raises(CheckpointError, match=rf"/{name}: auto_map names"):
        check_model(folder)
    change(folder / name, auto_map=None, image_processor={"list": [{}, {"auto_map": code}]})
    with pytest.raises(CheckpointError, match=rf"/{name}: image_processor.list.1.auto_map names"):
        check_model(folder)


@pytest.mark.parametrize(
    "text",
    [b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b"null", b'{"a":' * 50_000, b" " * (17 << 20)],
    ids=range(7),
)
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_configuration_that_is_no_object_is_named(folder: Path, name: str, text: bytes) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"/{name}: "):
        check_model(folder)


@pytest.mark.parametrize("name", ["config.json", "other_config.json", "tokenizer.json", "model-2.safetensors", INDEX])
@pytest.mark.parametrize("loader", ["check", "encoder", "student", "merge", "serve"])
def test_a_pipe_or_a_device_in_the_folder_does_not_hang(folder: Path, name: str, loader: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=r"a pipe, a socket or a device|no config.json|no model in this folder"):
        LOADERS[loader](folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"a pipe, a socket or a device|no config.json|no model in this folder"):
        LOADERS[loader](folder)


def auto_calls(path: Path) -> list[ast.Call]:
    """Return the calls `AutoSomething.from_pretrained(...)` and `from_config` in a file."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return [
        call
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in {"from_pretrained", "from_config"}
        and ast.unparse(call.func.value).rpartition(".")[2].startswith("Auto")
    ]


def test_one_file_asks_transformers_for_a_class_by_the_folders_word() -> None:
    package = Path(mmopd.__file__).parent
    assert [path for path in package.rglob("*.py") if auto_calls(path)] == []
    text = (package / "model_folder.py").read_text(encoding="utf-8")
    assert text.count(".from_pretrained(") == text.count("from_pretrained(folder, trust_remote_code=False)") == 1
    for path in (HERE / "benchmarks").glob("*.py"):
        assert all("trust_remote_code=False" in ast.unparse(call) for call in auto_calls(path)), path


def test_servers_run_no_code_of_a_folder(tmp_path: Path) -> None:
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    text = Path(found.origin).with_name("config").joinpath("model.py").read_text(encoding="utf-8")
    assert "    trust_remote_code: bool = False\n" in text
    spec = ServerSpec("a", tmp_path, Engine(), updatable=True)
    for gpus in ("", "0"):
        assert not any("trust" in word for word in to_server(spec, ("127.0.0.1", 1), tmp_path / "log", gpus)["argv"])


def split(folder: Path) -> dict[str, str]:
    """Put the weights into two files with an index, and return the index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(weights)}
    for file in set(index.values()):
        save_file({name: weights[name] for name in weights if index[name] == file}, folder / file)
    change(folder / INDEX, weight_map=index)
    check_model(folder)
    return index


@pytest.mark.parametrize(
    "name", ["../model-0.safetensors", "/etc/passwd", "other/model.safetensors", "./model-0.safetensors", "..", ".", ""]
)
def test_an_index_that_points_outside_is_refused(folder: Path, name: str) -> None:
    index = split(folder)
    first = next(iter(index))
    shutil.copy(folder / "model-0.safetensors", folder.parent)
    change(folder / INDEX, weight_map=index | {first: name})
    with pytest.raises(CheckpointError, match=f"{INDEX}: weight_map: '{first}' is in '{name}', which is no file name"):
        check_model(folder)


def test_an_index_of_other_files_is_refused(folder: Path) -> None:
    index = split(folder)
    for wrong, message in (
        ({**index, "more": "model-7.safetensors"}, r"weight_map names 'model-7.safetensors' \(1 tensors\)"),
        ({**index, "more": "model-0.safetensors"}, "'more' is in 'model-0.safetensors', and it is not"),
        ({}, "weight_map: expected the file of each tensor"),
        ([1], "weight_map: expected the file of each tensor"),
        ({"a": None}, "weight_map: expected the file of each tensor"),
    ):
        change(folder / INDEX, weight_map=wrong)
        with pytest.raises(CheckpointError, match=message):
            check_model(folder)
    (folder / INDEX).write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{INDEX}: not JSON"):
        check_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_a_file_that_is_not_whole_is_refused(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, int(size * keep) if isinstance(keep, float) else keep % size)
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a safetensors file, or not whole"):
        check_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickles_are_refused(folder: Path, name: str) -> None:
    torch.save({}, folder / name)
    check_model(folder)  # it has better ones
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"/{name}: the weights are in pickles.*convert the model"):
        check_model(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match="no weights in this folder; it needs"):
        check_model(folder)


WRONG: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cut": lambda w: w[:-1],
    "more": lambda w: torch.cat([w, w]),
    "flat": lambda w: w.flatten(),
    "turned": lambda w: w.t().contiguous(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_tensor_of_another_shape_is_named(folder: Path, wrong: str) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.mlp.down_proj.weight"))
    save_file(weights | {name: WRONG[wrong](weights[name])}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"the tensor '{name}' has the shape .* different models"):
        check_model(folder)
    change(folder / "config.json", quantization_config={"quant_method": "awq"})
    check_model(folder)  # packed weights have shapes of their own


@pytest.mark.parametrize("kinds", [None, [], "Qwen3", [1], {}])
def test_a_class_that_is_not_named_is_refused(folder: Path, kinds: Any) -> None:
    change(folder / "config.json", architectures=kinds)
    with pytest.raises(CheckpointError, match=r"config.json: architectures: expected the name of a class"):
        check_model(folder)


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    save_file({"encoder.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of its 1 tensors belongs to Qwen3VLForConditionalGeneration"):
        check_model(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_are_found_wherever_they_are(bad: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 50, dtype=dtype)
    assert is_finite(tensor)
    tensor[1, 17] = bad
    assert not is_finite(tensor)
    assert is_finite(torch.zeros(0, dtype=dtype))


def test_packed_numbers_are_finite() -> None:
    assert is_finite(torch.full((4,), 255, dtype=torch.uint8).view(torch.float8_e4m3fn))
    assert is_finite(torch.ones(3, dtype=torch.int32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_with_a_nan_is_refused_where_it_is_read(folder: Path, bad: float) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("visual.blocks.0.mlp.linear_fc1.weight"))
    weights[name].view(-1)[5] = bad
    save_file(weights, file, metadata={"format": "pt"})
    for read in (lambda: load_student(folder, torch.float32), lambda: merge_it(folder), lambda: check_finite(file)):
        with pytest.raises(CheckpointError, match=f"the tensor '{name}' has values that are not finite"):
            read()


def test_vllm_refuses_weights_that_are_not_finite_while_it_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from mmopd.rollout.vllm_plugin import refuse_nan

    read = [("a", torch.ones(2)), ("b", torch.tensor([1.0, float("nan")])), ("c", torch.ones(1))]
    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", lambda self, model_config, model: iter(read))
    refuse_nan()
    weights = DefaultModelLoader.get_all_weights(None, SimpleNamespace(model="folder"), None)
    assert next(iter(weights))[0] == "a"
    with pytest.raises(ValueError, match="folder: the tensor 'b' has values that are not finite"):
        list(weights)
    source = inspect.getsource(DefaultModelLoader.load_weights)
    assert "model.load_weights(self.get_all_weights(model_config, model))" in source


def test_an_adapter_does_not_lead_to_the_weights_of_another_folder(folder: Path, model: Path) -> None:
    change(folder / "adapter_config.json", base_model_name_or_path=str(model), peft_type="LORA")
    for read in (LOADERS["check"], LOADERS["student"], LOADERS["serve"]):
        with pytest.raises(CheckpointError, match=r"/adapter_config.json: an adapter in the folder of a model"):
            read(folder)
