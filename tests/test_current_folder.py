"""Files of the user in the current folder are imported by no process of mmopd, whatever their names are."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_locales import ASCII
from waiting import wait_for, wait_for_exit

import mmopd
from mmopd.errors import CheckpointError
from mmopd.records import Prompt
from mmopd.runtime import python
from mmopd.runtime.http import SPELLINGS
from mmopd.serving.readiness import SAYS_READY
from mmopd.task.verifier_pool import VerifierPool

ROOT = Path(__file__).parents[1]
# Modules of Python, of libraries and of mmopd itself; a process needs some of them before it runs a line of ours.
NEEDED_TO_START = ("types", "mmopd")
NAMES = (
    *NEEDED_TO_START,
    "random",
    "queue",
    "logging",
    "json",
    "subprocess",
    "threading",
    "tokenizers",
    "torch",
    "vllm",
)
TRAP = """import os
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "imported"), "a") as file:
    file.write(f"{__name__} by {open('/proc/self/cmdline').read()!r}" + chr(10))
raise SystemExit(f"{__name__} of the current folder was imported")
"""
SCRIPT = str(Path(sys.executable).parent / "mmopd")


def set_traps(folder: Path, names: tuple[str, ...] = NAMES) -> None:
    for name in names:
        (folder / f"{name}.py").write_text(TRAP, encoding="utf-8")


def caught(folder: Path) -> str:
    marks = folder / "imported"
    return marks.read_text(encoding="utf-8") if marks.exists() else ""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a workspace full of traps, with a few rows."""
    monkeypatch.chdir(tmp_path)
    turn = ({"role": "user", "content": [{"type": "text", "text": "How many?"}]},)
    mmopd.write_shards([Prompt("a/0", "additions", "text", turn, (), "3")], tmp_path / "shards")
    (tmp_path / "mine.yaml").write_text("sources: {a: {shards: shards, task: additions}}", encoding="utf-8")
    rows = [json.dumps({"question": f"What is {i}+1?", "answer": i + 1}) for i in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    set_traps(tmp_path)
    yield tmp_path
    assert caught(tmp_path) == ""


def run(*command: str, **env: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, encoding="utf-8", check=False, timeout=600
    )


COMMANDS = [
    ["--help"],
    ["init", "copied"],
    ["show", "recipes/demo.yaml"],
    ["show", "mine.yaml"],
    ["show", "--explain", "train.lr"],
    ["plan", "recipes/multi_teacher_2b.yaml"],
    ["doctor"],
    ["index", "shards"],
    ["prepare", "data/generic.py", "made", "--set", "data=sums.jsonl", "--set", "task=additions", "--workers", "2"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_command_imports_nothing_from_the_current_folder(here: Path, command: list[str]) -> None:
    done = run(SCRIPT, *command)
    allowed = {"doctor": (0, 1), "plan": (CheckpointError.exit_status,)}  # there is no model
    assert done.returncode in allowed.get(command[0], (0,)), done.stderr


@pytest.mark.parametrize("path", [f":{ROOT}", f"{ROOT}:", f"{ROOT}::{ROOT / 'tests'}"])
def test_an_empty_entry_of_pythonpath_is_not_the_current_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", path)
    done = run(*python.command("-c", "import queue, tokenizers, mmopd"), **python.environment())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags", [["-P"], []])
def test_python_m_mmopd_imports_nothing_either_once_it_has_started(tmp_path: Path, flags: list[str]) -> None:
    set_traps(tmp_path, tuple(name for name in NAMES if flags or name not in NEEDED_TO_START))
    done = subprocess.run(
        [sys.executable, *flags, "-m", "mmopd", "show", "recipes/demo.yaml"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert caught(tmp_path) == ""


def test_an_mmopd_that_only_the_current_folder_has_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "mmopd").symlink_to(ROOT / "mmopd")
    code = f"""import os, runpy, sys
sys.path[:] = [{str(tmp_path)!r}, *(path for path in sys.path[1:] if not os.path.exists(path + "/mmopd"))]
runpy.run_module("mmopd", run_name="__main__", alter_sys=True)"""
    done = run(sys.executable, "-c", code, PYTHONPATH="")
    assert done.returncode == 1
    assert f"mmopd is in {tmp_path}, but not installed" in done.stderr


def test_verifiers_import_nothing_from_the_current_folder(here: Path) -> None:
    with VerifierPool(workers=1, timeout=60) as pool:
        assert pool.submit("text_math", r"It is \boxed{4}.", "4").result().value == 1


def test_what_a_process_of_ours_starts_in_turn_imports_nothing_either(here: Path) -> None:
    inner = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import queue, tokenizers'], check=True)"
    done = run(*python.command("-c", inner), **python.environment())
    assert done.returncode == 0, done.stderr


def test_every_python_process_is_started_by_the_one_function() -> None:
    isolated = ("mmopd/runtime/processes.py", "mmopd/repair.py", "mmopd/task/sandbox.py")  # with -I or -P of their own
    forks = "mmopd/serving/supervisor.py"  # starts no interpreter
    for path in (path for scope in ("mmopd", "modalities", "data", "eval") for path in (ROOT / scope).rglob("*.py")):
        where = str(path.relative_to(ROOT))
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            if where == "mmopd/runtime/python.py":
                continue
            if "sys.executable," in line:
                assert where in isolated, f"{where}:{number}: use mmopd.runtime.python.command"
                assert re.search(r'"-[IP]"', line), f"{where}:{number}: imports from the current folder"
            if "get_context(" in line:
                assert where == forks, f"{where}:{number}: use mmopd.runtime.python.fork_server"
                assert 'get_context("fork")' in line


def test_a_whole_run_imports_nothing_from_its_folder_asks_no_proxy_and_needs_no_utf_8_of_the_locale(
    server: None, workspace: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "workspace"
    shutil.copytree(workspace, folder, ignore=shutil.ignore_patterns("runs", "commands"))
    set_traps(folder)
    recipe = (folder / "recipes" / "small.yaml").read_text(encoding="utf-8")
    (folder / "recipes" / "übung.yaml").write_text(f"# für Übungen …\n{recipe}", encoding="utf-8")
    env = os.environ | dict.fromkeys(SPELLINGS, "http://127.0.0.1:9") | {"NO_PROXY": "", "no_proxy": ""} | ASCII
    settings = ["train.steps=1", "rollout.prompts=6", "rollout.group=4", "algorithm.difficulty.attempts=2"]

    def start(name: str, *command: str) -> "subprocess.Popen[bytes]":
        with (folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen([SCRIPT, *command], cwd=folder, env=env, stdout=log, stderr=log)

    train = start("train", "train", "recipes/übung.yaml", *settings, "--run", "runs/one")
    (status,) = wait_for_exit([train], [folder])
    assert status == 0, (folder / "train.log").read_text(encoding="utf-8", errors="replace")
    logs = [path.read_bytes() for path in (folder / "runs" / "one" / "logs").glob("*.log")]
    assert not any(b"UnicodeEncodeError" in text or b"UnicodeDecodeError" in text for text in logs)
    for name in ("student", "text_teacher.0"):
        assert SAYS_READY in (folder / "runs" / "one" / "logs" / f"{name}.log").read_bytes()
    serve = start("serve", "serve", "teachers/demo.yaml")
    said = folder / "serve.log"
    wait_for(lambda: "Ctrl-C stops." in said.read_text(encoding="utf-8") or serve.poll() is not None, [folder])
    serve.send_signal(signal.SIGTERM)
    assert serve.wait(60) == 0, said.read_text(encoding="utf-8")
    assert caught(folder) == ""
