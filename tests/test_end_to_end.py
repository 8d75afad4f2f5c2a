"""The whole job on a world of a few rows, with real vLLM servers, ZeRO-3 on two ranks and lmms-eval; no process
survives it.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import forks
import pytest
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
from waiting import wait_for, wait_for_exit

from mmopd.config import Recipe
from mmopd.evaluate import Results
from mmopd.report.metrics import read_lines
from mmopd.runtime.fingerprint import hash_model
from mmopd.runtime.run_folder import RunFolder
from mmopd.settings_file import read

pytestmark = pytest.mark.usefixtures("server")
SMALL = [
    "train.steps=4",
    "train.checkpoint_every=2",
    "rollout.prompts=6",
    "rollout.group=4",
    "algorithm.difficulty.attempts=2",
]
NO_SUITE = "suite=null"
MARK = "MMOPD_TEST_MARK"


class Command:
    """A `mmopd` command in a workspace, marked so that every process it starts can be found.

    Args:
        workspace: its current folder.
        args: its arguments.
        forked: fork it, its servers and its ranks (see `forks`), which starts them without their imports.
    """

    def __init__(self, workspace: Path, *args: str, forked: bool = False) -> None:
        self.mark = uuid.uuid4().hex
        self.logs = workspace / "commands" / self.mark
        self.logs.mkdir(parents=True)
        self.output, self.written = self.logs / "output.log", [self.logs, workspace / "runs"]
        self.process: subprocess.Popen[bytes] | forks.Forked
        env = {**os.environ, MARK: self.mark}
        with self.output.open("wb") as output:
            if forked:
                self.process = forks.Forked(["mmopd", *args], env, [0, output.fileno(), output.fileno()], workspace)
            else:
                command = [sys.executable, "-m", "mmopd", *args]
                self.process = subprocess.Popen(command, cwd=workspace, env=env, stdout=output, stderr=output)

    def finish(self) -> tuple[int, str]:
        (status,) = wait_for_exit([self.process], self.written)
        return status, self.output.read_text(encoding="utf-8")

    def wait_for(self, happened: Callable[[], bool]) -> None:
        def look() -> bool:
            if happened():
                return True
            assert self.process.poll() is None, self.output.read_text(encoding="utf-8")
            return False

        wait_for(look, self.written)

    def survivors(self) -> list[str]:
        """Return the command lines of processes that still carry the mark."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text(encoding="utf-8").replace("\0", " "))
            except OSError:
                continue
        return found

    def assert_nothing_survives(self, within: float = 15) -> None:
        deadline = time.monotonic() + within
        while (left := self.survivors()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left


@pytest.fixture(scope="module")
def finished(workspace: Path) -> tuple[RunFolder, str]:
    command = Command(workspace, "train", "recipes/small.yaml", *SMALL, "--run", "runs/whole")
    status, output = command.finish()
    assert status == 0, output
    command.assert_nothing_survives()
    return RunFolder(workspace / "runs" / "whole"), output


def test_every_step_is_recorded_with_engine_and_trainer_in_agreement(finished: tuple[RunFolder, str]) -> None:
    run, _ = finished
    steps = read_lines(run.metrics)
    assert [row["step"] for row in steps] == [0, 1, 2, 3]
    for row in steps:
        assert row["responses"] == 24
        assert row["probe"] <= 1e-4
        assert row.get("mismatch", 0) <= 1e-4
        assert row["absent"] == row["unknown"] == 0
        assert {"accuracy/additions", "accuracy/digit_sum", "return", "seconds/rollout", "seconds/sync"} <= row.keys()
    assert list((run.root / "tensorboard").iterdir())
    assert read_lines(run.samples)


def test_the_run_folder_can_repeat_the_run(finished: tuple[RunFolder, str]) -> None:
    run, _ = finished
    assert read(Recipe, run.recipe_file).train.steps == 4
    assert json.loads(run.versions.read_text(encoding="utf-8"))["mmopd"]
    difficulty = json.loads((run.difficulty / "difficulty.json").read_text(encoding="utf-8"))
    assert {name: len(one["weights"]) for name, one in difficulty["sources"].items()} == {
        "additions": 16,
        "digit_sum": 16,
    }
    assert {path.name for path in run.checkpoints.iterdir()} == {"step-00000002", "step-00000004"}
    assert {"serve", "difficulty", "distil"} <= json.loads(run.timings.read_text(encoding="utf-8")).keys()


def test_student_and_teachers_are_evaluated_before_and_the_student_after(finished: tuple[RunFolder, str]) -> None:
    run, output = finished
    results = Results.read(run.results)
    assert [row.name for row in results.rows] == ["base", "text_teacher", "image_teacher", "distilled"]
    assert not results.failures()
    assert all(row.record(column).n == 6 for row in results.rows for column in ("Additions", "Digit sums"))  # type: ignore[union-attr]
    assert "distilled" in output
    assert run.report.stat().st_size > 1_000_000  # it includes plotly


def test_the_exported_student_loads_and_is_another_model_than_the_base(
    finished: tuple[RunFolder, str], workspace: Path
) -> None:
    run, _ = finished
    model, info = Qwen3VLForConditionalGeneration.from_pretrained(run.export, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.architectures == ["Qwen3VLForConditionalGeneration"]
    AutoProcessor.from_pretrained(run.export)
    assert hash_model(run.export) != hash_model(workspace / ".mmopd" / "demo" / "base")


def test_no_key_is_left_in_the_run_folder(finished: tuple[RunFolder, str]) -> None:
    run, _ = finished
    assert not run.endpoints.exists()
    for log in run.logs.iterdir():
        assert "Bearer" not in log.read_text(encoding="utf-8")
        assert "VLLM_API_KEY=" not in log.read_text(encoding="utf-8")


def test_a_second_run_into_the_same_folder_is_refused(finished: tuple[RunFolder, str], workspace: Path) -> None:
    status, output = Command(workspace, "train", "recipes/small.yaml", "--run", "runs/whole").finish()
    assert status == 2
    assert "runs/whole: this run folder exists" in output


def test_ctrl_c_stops_everything_and_says_so(workspace: Path) -> None:
    command = Command(workspace, "train", "recipes/small.yaml", *SMALL, NO_SUITE, "--run", "runs/interrupted")
    command.wait_for(lambda: len(command.survivors()) > 3)
    command.process.send_signal(signal.SIGINT)
    status, output = command.finish()
    assert status == 130
    assert "interrupted" in output
    command.assert_nothing_survives()
