"""What the terminal and the log of a run say: a line for each step, the latest step at a glance, the time left."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mmopd import catalog
from mmopd.runtime import progress
from mmopd.runtime.progress import Stages, duration
from mmopd.runtime.run_folder import RunFolder
from mmopd.runtime.step_lines import Glance, NewSteps, one_line
from mmopd.runtime.time_left import TimeLeft, usual_seconds

STEP = {
    "step": 0,
    "seconds": 2.31,
    "return": -0.5685,
    "accuracy/additions": 0.539,
    "accuracy/digit_sum": None,
    "kept": 156.0,
    "masked": 0.0,
    "absent": 3.0,
    "unknown": 0.0,
    "skipped_updates": 0.0,
    "memory/rank0": 0.905,
    "memory/host": 5.25,
}


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Take the time of stages from a clock that the test moves."""
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_step_is_one_line_with_its_memory_and_without_what_it_lacks() -> None:
    assert one_line(STEP) == (
        "2.3 s/step  return -0.569  right: additions 0.54  kept 156  masked 0  failed 3  unknown 0  host 5.2 GiB  "
        "rank 0 0.9 GiB"
    )
    assert one_line({"seconds": 1.0, "loss": None}) == "1.0 s/step  loss nan"


def test_a_log_has_each_step_once_as_one_line_without_control_codes(tmp_path: Path, clock: Clock) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps(STEP) + "\n", encoding="utf-8")
    new = NewSteps(metrics)
    out = io.StringIO()
    with Stages(Console(file=out, width=40)) as stages, stages.stage("distil") as stage:
        stage.total(5, done=1)
        for step in (1, 2, 3):
            clock.now += 2.0
            with metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(STEP | {"step": step}) + "\n" + ('{"step": 4' if step == 3 else ""))
            for line in new.read():
                stage.total(5, done=int(line["step"]) + 1)
                stage.log(one_line(line))
    lines = out.getvalue().splitlines()
    assert [line.partition(":")[0] for line in lines[1:-1]] == ["  distil 2/5", "  distil 3/5", "  distil 4/5"]
    assert lines[2].endswith("4 s left of distil")
    assert lines[3].endswith("2 s left of distil")
    assert "\x1b" not in out.getvalue()


def test_a_metrics_file_that_a_resume_has_cut_is_read_from_its_new_end(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(STEP | {"step": i}) + "\n" for i in range(3)), encoding="utf-8")
    new = NewSteps(metrics)
    metrics.write_text(json.dumps(STEP) + "\n", encoding="utf-8")
    assert new.read() == []
    with metrics.open("a", encoding="utf-8") as file:
        file.write(json.dumps(STEP | {"step": 1}) + "\n")
    assert [step["step"] for step in new.read()] == [1]


def test_a_glance_compares_with_the_first_step_and_counts_faults_since_the_start() -> None:
    restarts = {"student": 0, "text.0": 0}
    glance = Glance(restarts)
    assert glance.rows() == ""
    glance.add(STEP)
    restarts["text.0"] = 2
    glance.add(STEP | {"step": 1, "accuracy/additions": 0.8, "return": -0.1, "skipped_updates": 1.0, "replaced/a": 4.0})
    rows = {row.split()[0]: row for row in glance.rows().splitlines()}
    assert "additions 0.54 → 0.80" in rows["right"]
    assert "digit_sum" not in rows["right"]
    assert "return -0.57 → -0.10" in rows["learns"]
    for fault in ("6 responses without a score", "1 updates skipped", "4 rows replaced", "text.0 restarted 2 x"):
        assert fault in rows["faults"]
    assert "student" not in rows["faults"]
    assert "host 5.2 GiB" in rows["memory"]


def test_the_time_left_is_known_from_the_first_second_and_follows_the_pace_of_this_machine(clock: Clock) -> None:
    out = io.StringIO()
    with Stages(Console(file=out, width=200)) as stages:
        stages.expect({"prepare": 100, "serve": 20, "distil": 80})
        with stages.stage("prepare"):
            assert stages.left() == "about 3 min left"  # 200 s
            clock.now += 300
        with stages.stage("serve"):
            assert stages.left() == "about 5 min left"  # 100 s at three times the usual seconds
            clock.now += 1  # found in a cache: says nothing about the pace
        with stages.stage("distil") as stage:
            stage.total(10)
            assert stages.left() == "about 4 min left"
            stage.advance()
            clock.now += 7
            stage.advance()
            assert stages.left() == "about 56 s left"
        with stages.stage("a stage of nobody"):
            assert stages.left() == ""


def test_usual_seconds_are_those_of_the_newest_finished_run_with_the_same_settings(tmp_path: Path) -> None:
    recipe = catalog.load_recipe(Path("recipes/demo.yaml"))
    for name, of, seconds in (("a", recipe, 5), ("b", recipe.model_copy(update={"mixture": "other"}), 6)):
        run = RunFolder(tmp_path / name)
        run.create(of)
        run.timings.write_text(json.dumps({"distil": seconds}), encoding="utf-8")
        run.report.write_text("", encoding="utf-8")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "report.html").write_text("damaged", encoding="utf-8")
    now = RunFolder(tmp_path / "now")
    assert usual_seconds(now, recipe.model_copy(update={"seed": 7}), {"distil": 1}) == {"distil": 5}
    assert usual_seconds(RunFolder(tmp_path / "elsewhere" / "now"), recipe, {"distil": 1}) == {"distil": 1}


def test_usual_seconds_of_the_demo_name_its_stages(tmp_path: Path) -> None:
    usual = catalog.load_module(Path("data/demo.py")).USUAL_SECONDS
    left = TimeLeft(usual)
    assert left.after("report") == 0
    assert left.of_stage("prepare", 0.0) == usual["prepare"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(3.4, "3 s"), (119, "119 s"), (121, "2 min"), (7100, "118 min"), (7300, "2 h 2 min")]
)
def test_a_duration_is_short(seconds: float, words: str) -> None:
    assert duration(seconds) == words
