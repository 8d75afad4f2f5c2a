"""Commands that need no model load none of the heavy libraries; `import mmopd` loads only itself.

The tests assert on loaded modules, since times depend on the machine. `benchmarks/cli.py` measures the times.
"""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from published import write_models
from run_folders import write_run

import mmopd
from mmopd import algorithm
from mmopd.records import Prompt

HEAVY = {
    *("torch", "torchvision", "transformers", "accelerate", "deepspeed", "vllm", "peft", "liger_kernel", "triton"),
    *("sklearn", "scipy", "pandas", "matplotlib", "plotly", "sympy", "math_verify", "lmms_eval", "datasets"),
    *("pyarrow", "webdataset", "tensorboard", "aiohttp", "fsspec"),
}
# Runs commands one after the other, and prints the loaded modules after each.
PROGRAM = """
import contextlib, io, json, sys
from mmopd.cli import app
loaded = {}
for command in json.loads(sys.argv[1]):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            app(command)
        except SystemExit as end:
            status = end.code
    loaded[" ".join(command)] = [status, sorted({name.partition(".")[0] for name in sys.modules})]
print(json.dumps(loaded))
"""
ROOT = Path(mmopd.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted((ROOT / "docs").glob("*.md"))]


def loaded_by(commands: list[list[str]], folder: Path) -> dict[str, list]:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_commands_that_need_no_model_load_no_heavy_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = write_models(tmp_path)
    Image.new("RGB", (32, 32)).save(workspace / "one.png")
    picture = (workspace / "one.png").read_bytes()
    turn = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},)
    mmopd.write_shards([Prompt("a/0", "digit_sum", "image", turn, (picture,), "3")], workspace / "shards")
    (workspace / "mine.yaml").write_text("sources: {a: {shards: shards, task: digit_sum}}", encoding="utf-8")
    write_run(workspace / "run")
    commands = [
        ["--help"],
        ["new", "task", "other"],
        ["inspect", "shards"],
        ["inspect", "mine.yaml", "--json"],
        ["inspect", "run", "--page", "page.html"],
        ["show", "recipes/demo.yaml"],
        ["show", "recipes/cross_modal_4b.yaml"],
        ["show", "mine.yaml"],
        ["plan", "recipes/multi_teacher_2b.yaml"],
        ["plan", "recipes/cross_modal_4b.yaml", "train.lora={rank: 8}"],
        ["plan", "recipes/strong_to_weak_text.yaml"],
        ["doctor"],
    ]
    loaded = loaded_by(commands, workspace)
    for command, (status, modules) in loaded.items():
        assert status in (0, 1), command
        assert HEAVY.isdisjoint(modules), command


def test_importing_the_package_loads_only_its_own_modules() -> None:
    code = "import importlib, sys, typing; before = set(sys.modules); import mmopd; print(*set(sys.modules) - before)"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert set(done.stdout.split()) == {"mmopd", "mmopd.lazy"}


@pytest.mark.parametrize("package", ["mmopd", "mmopd.prompts", "mmopd.modality"])
def test_every_public_name_resolves_and_others_are_errors(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_docs_import_the_public_api_or_a_documented_module(page: Path) -> None:
    documented = {"mmopd.task": {"Task", "verify", "code", "documents"}, "mmopd.prompts": {"convert"}}
    documented["mmopd.prompts.convert"] = {"SourceSettings"}
    documented |= {"mmopd.algorithm": {*algorithm.__all__}, "mmopd.settings_file": {"Fraction"}}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mmopd":
                allowed = {*mmopd.__all__} if node.module == "mmopd" else documented[str(node.module)]
                assert {alias.name for alias in node.names} <= allowed, f"{page}: from {node.module}"
