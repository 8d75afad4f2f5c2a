"""ExPO: the written weights equal the formula, tensor by tensor; models that cannot be merged are refused by name."""

import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmopd.commands.merge import merge, parse_teacher
from mmopd.demo.world import build_student
from mmopd.errors import UserError
from mmopd.runtime.progress import Stages


def model(folder, *files, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "x", **config}), encoding="utf-8")
    for i, tensors in enumerate(files):
        save_file(tensors, folder / f"model-{i:05d}-of-{len(files):05d}.safetensors")
    return folder


def run(base, teachers, alpha, out):
    with Stages(Console(quiet=True)) as stages, stages.stage("merge") as stage:
        merge(base, teachers, alpha, out, stage)
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_the_numbers_are_those_of_the_formula_whatever_file_a_tensor_is_in(tmp_path):
    ids = torch.tensor([1, 2])
    base = model(tmp_path / "base", {"a": torch.tensor([1.0, 2.0])}, {"b": torch.tensor([4.0]), "ids": ids}, seen=1)
    one = model(tmp_path / "one", {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([8.0]), "ids": ids})
    two = model(tmp_path / "two", {"b": torch.tensor([0.0])}, {"a": torch.tensor([1.0, 6.0]), "ids": ids})
    merged = run(base, {one: 3.0, two: 1.0}, 1.5, tmp_path / "out")
    # a: base + 1.5 (0.75 one + 0.25 two - base) = [1 + 1.5 * 1.5, 2 + 1.5 * 1]; b: 4 + 1.5 (6 - 4)
    assert merged["a"].tolist() == [3.25, 3.5]
    assert merged["b"].tolist() == [7.0]
    assert merged["ids"].tolist() == [1, 2]
    assert sorted(f.name for f in (tmp_path / "out").glob("*.safetensors")) == sorted(
        f.name for f in base.glob("*.safetensors")
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["seen"] == 1


def test_it_is_computed_in_float32_and_written_in_the_dtype_of_the_base(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base, one, two = (torch.randn(1000, generator=generator).bfloat16() for _ in range(3))
    folders = [model(tmp_path / str(i), {"w": tensor}) for i, tensor in enumerate((base, one, two))]
    merged = run(folders[0], {folders[1]: 1.0, folders[2]: 1.0}, 1.25, tmp_path / "out")["w"]
    expected = base.float() + 1.25 * ((one.float() + two.float()) / 2 - base.float())
    assert merged.dtype == torch.bfloat16
    assert (merged.float() - expected).abs().max() <= expected.abs().max() * 2**-8


def test_alpha_one_and_one_teacher_is_that_teacher(tmp_path):
    base = model(tmp_path / "base", {"w": torch.tensor([1.0, -2.0])})
    one = model(tmp_path / "one", {"w": torch.tensor([5.0, 0.25])})
    assert run(base, {one: 7.0}, 1.0, tmp_path / "out")["w"].tolist() == [5.0, 0.25]


def test_a_merged_student_is_a_model_that_transformers_loads(tmp_path):
    for i in range(3):
        build_student(tmp_path / str(i), seed=i)
    run(tmp_path / "0", {tmp_path / "1": 1.0, tmp_path / "2": 1.0}, 1.25, tmp_path / "out")
    states = [
        AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict() for name in ("0", "1", "2", "out")
    ]
    for name, base in states[0].items():
        expected = base + 1.25 * ((states[1][name] + states[2][name]) / 2 - base)
        torch.testing.assert_close(states[3][name], expected, rtol=0, atol=1e-6)
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer.eos_token_id is not None


def test_what_cannot_be_merged_is_refused_by_name_and_nothing_is_left(tmp_path):
    base = model(tmp_path / "base", {"w": torch.ones(2), "ids": torch.tensor([1])})
    shape = model(tmp_path / "shape", {"w": torch.ones(3), "ids": torch.tensor([1])})
    more = model(tmp_path / "more", {"w": torch.ones(2), "ids": torch.tensor([1]), "head": torch.ones(1)})
    ids = model(tmp_path / "ids", {"w": torch.ones(2), "ids": torch.tensor([2])})
    broken = model(tmp_path / "broken", {"w": torch.ones(2)})
    next(broken.glob("*.safetensors")).write_bytes(b"no tensors")
    out = tmp_path / "out"
    for teachers, says in [
        ({shape: 1.0}, r"shape: different architecture from .*base: 'w' has shape \[3\], not \[2\]"),
        ({more: 1.0}, r"the tensor 'head' is only in .*more"),
        ({ids: 1.0}, "ids: an integer tensor that differs"),
        ({broken: 1.0}, r"broken.*cannot be read as safetensors"),
        ({tmp_path / "nowhere": 1.0}, "nowhere: no model in this folder"),
        ({base: 0.0}, "a weight above 0"),
        ({base: float("nan")}, "a weight above 0"),
        ({}, "merge needs teachers"),
    ]:
        with pytest.raises(UserError, match=says):
            run(base, teachers, 1.25, out)
        assert not out.exists()
        assert not list(tmp_path.glob(".*"))
    out.mkdir()
    with pytest.raises(UserError, match="exists already"):
        run(base, {base: 1.0}, 1.25, out)


def test_the_command_takes_weights_after_an_equals_sign(tmp_path):
    assert parse_teacher("/m/a=2.5") == (parse_teacher("/m/a")[0], 2.5)
    with pytest.raises(UserError, match="expected FOLDER or FOLDER=WEIGHT"):
        parse_teacher("/m/a=heavy")
    base = model(tmp_path / "base", {"w": torch.zeros(1)})
    one, two = (model(tmp_path / name, {"w": torch.full((1,), value)}) for name, value in (("one", 1.0), ("two", 5.0)))
    command = [
        sys.executable,
        "-m",
        "mmopd",
        "merge",
        str(base),
        f"{one}=3",
        str(two),
        "--alpha",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert load_file(next((tmp_path / "out").glob("*.safetensors")))["w"].item() == 4.0
