"""Jobs with a time limit: signals that ask a run to stop, its limit, and a job script that requeues itself."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner
from waiting import wait_for

from mmopd import cli
from mmopd.catalog import load_recipe, shipped
from mmopd.commands.open_run import open_run
from mmopd.errors import STOPPED, UserError
from mmopd.runtime import time_limit, watchdog
from mmopd.runtime.processes import STOPS, Children
from mmopd.runtime.run_folder import RunFolder
from mmopd.runtime.time_limit import RECENT, TimeLimit, start_limit

ROOT = Path(cli.__file__).parents[1]
DEMO = shipped() / "recipes" / "demo.yaml"
# A `mmopd train` whose work is to wait for a signal.
WAITING = """import sys, time, types
from mmopd import cli
train = sys.modules["mmopd.commands.train"] = types.ModuleType("train")  # the real one loads torch
def launch(*args, **kwargs):
    print("at work", flush=True)
    time.sleep(60)
train.launch = launch
sys.argv[1:] = ["train", sys.argv[1], "--run", "run", "--resume-or-start"]
cli.main()
"""


# Signals


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_stops_a_command_with_a_word_and_a_status_of_its_own(number: signal.Signals, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", WAITING, str(DEMO)],
            cwd=tmp_path,
            stdout=out,
            stderr=out,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
    try:
        wait_for(lambda: "at work" in (tmp_path / "out").read_text(encoding="utf-8"), [tmp_path])
        process.send_signal(number)
        assert process.wait(60) == STOPPED
    finally:
        process.kill()
    assert "stopped as requested; `mmopd train --resume run` continues" in (tmp_path / "out").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_asks_and_the_same_again_later_ends(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    before = [signal.getsignal(one) for one in STOPS]
    with watchdog.asked_to_stop() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # to every process, and once more through the launcher
        assert asked.is_set()
        now += 60
        others = [one for one in STOPS if one != number]
        for one in others:  # such as SIGTERM at the limit, after SIGUSR1 before it
            os.kill(os.getpid(), one)
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), number)
        assert ended.value.code == 128 + number
    assert [signal.getsignal(one) for one in STOPS] == before


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_to_every_process_ends_no_child(number: signal.Signals, tmp_path: Path) -> None:
    with Children() as children:
        child = children.start("c", ["sh", "-c", "echo $$; sleep 60"], tmp_path / "log")
        wait_for(lambda: child.log.read_text(encoding="utf-8").endswith("\n"), [tmp_path])
        below = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text(encoding="utf-8").split()
        assert below  # the inner guard
        for pid in (child.pid, *map(int, below), int(child.log.read_text(encoding="utf-8"))):
            os.kill(pid, number)
        time.sleep(0.3)
        assert child.alive
        child.terminate()
        assert child.wait(10) == 128 + signal.SIGTERM


# The time limit


def test_a_run_stops_while_a_step_and_a_checkpoint_still_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time_limit.time, "time", lambda: now)
    limit = TimeLimit(until=1100)
    assert not limit.is_over(10, 0)  # 10 s for a step, and as long for a checkpoint
    now = 1079
    assert not limit.is_over(5, 0)  # the longest step counts
    now = 1081
    assert limit.is_over(5, 0)
    assert not limit.is_over(5, 8)  # a checkpoint is measured: 10 + 8
    now = 1083
    assert limit.is_over(5, 0)  # and is not forgotten


def test_a_long_step_is_forgotten_and_no_limit_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit.time, "time", lambda: 0.0)
    limit = TimeLimit(until=100)
    assert limit.is_over(1000, 0)
    assert all(limit.is_over(1, 0) for _ in range(RECENT - 1))
    assert not limit.is_over(1, 0)
    assert not TimeLimit().is_over(1e9, 1e9)


def test_ranks_read_the_limit_that_the_launcher_starts(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    start_limit(run, 1)
    assert not TimeLimit.of(run).is_over(1, 0)
    assert TimeLimit.of(run).is_over(31, 0)
    start_limit(run, None)
    assert not TimeLimit.of(run).is_over(1e9, 0)


# One command for the first job and for all others


def opened(tmp_path: Path, *overrides: str, **more: object) -> tuple[RunFolder, int, str]:
    console = Console(record=True, width=500)
    settings = {"resume": None, "or_start": True} | more
    folder, recipe = open_run(DEMO, overrides, tmp_path / "run", console, **settings)  # type: ignore[arg-type]
    return folder, recipe.train.steps, console.export_text()


def test_a_run_is_started_then_goes_on_with_its_own_settings_and_says_what_differs(tmp_path: Path) -> None:
    folder, steps, said = opened(tmp_path, "train.steps=7")
    assert (steps, said) == (7, "")
    assert opened(tmp_path, "train.steps=7")[1:] == (7, "")
    _, steps, said = opened(tmp_path, "train.steps=8", "train.minutes=5")
    assert steps == 7
    assert f"{folder.root} goes on with its own recipe.yaml" in said
    assert said.strip().endswith("differs from " + str(DEMO) + " in train.minutes, train.steps")
    with pytest.raises(UserError, match="this run folder exists already"):
        opened(tmp_path, or_start=False)


def test_arguments_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    for arguments in (["--resume-or-start"], [str(DEMO), "--resume-or-start"], ["--resume-or-start", "--run", "r"]):
        with pytest.raises(UserError, match="--resume-or-start needs a recipe and --run"):
            CliRunner().invoke(cli.app, ["train", *arguments], catch_exceptions=False)
    with pytest.raises(UserError, match="--resume takes no recipe"):
        opened(tmp_path, resume=tmp_path)


def test_a_limit_is_a_setting_with_a_range() -> None:
    assert load_recipe(DEMO, overrides=["train.minutes=0.5"]).train.minutes == 0.5
    with pytest.raises(UserError, match=r"train\.minutes"):
        load_recipe(DEMO, overrides=["train.minutes=0"])


# The job script of docs/schedulers.md

MMOPD = """#!/bin/bash
echo "mmopd $*" >> "$CALLS"
trap 'echo "asked" >> "$CALLS"; exit 75' USR1
[ -n "$ENDS" ] && exit $ENDS
while true; do sleep 0.05; done
"""
OTHER = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
[ "$(basename "$0")" != "$FAILS" ]
"""


def start_job(folder: Path, **env: str) -> "subprocess.Popen[bytes]":
    """Start the script of the docs with stand-ins that write down how they are called."""
    page = (ROOT / "docs" / "schedulers.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    (folder / "job.sh").write_text(script, encoding="utf-8")
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    (folder / "bin").mkdir()
    for name, text in {"mmopd": MMOPD, "scontrol": OTHER, "sbatch": OTHER}.items():
        (folder / "bin" / name).write_text(text, encoding="utf-8")
        (folder / "bin" / name).chmod(0o755)
    own = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "CALLS": str(folder / "calls"), "SLURM_JOB_ID": "7"}
    own |= {"SLURM_SUBMIT_DIR": str(folder), "ENDS": "", "FAILS": ""}
    return subprocess.Popen(["bash", folder / "job.sh"], env=os.environ | own | env)


CALL = "mmopd train recipes/mine.yaml --run runs/mine --resume-or-start"


@pytest.mark.parametrize(
    ("env", "status", "calls"),
    [
        ({"ENDS": "0"}, 0, []),
        ({"ENDS": "5"}, 5, []),
        ({"ENDS": "75"}, 0, ["scontrol requeue 7"]),
        ({"ENDS": "75", "FAILS": "scontrol"}, 0, ["scontrol requeue 7", "sbatch job.sh"]),
    ],
)
def test_a_job_is_requeued_if_the_run_has_stopped_as_asked_and_only_then(
    env: dict[str, str], status: int, calls: list[str], tmp_path: Path
) -> None:
    assert start_job(tmp_path, **env).wait(60) == status
    assert (tmp_path / "calls").read_text(encoding="utf-8").splitlines() == [CALL, *calls]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_passes_its_signal_on_and_requeues(number: signal.Signals, tmp_path: Path) -> None:
    job = start_job(tmp_path)
    try:
        wait_for((tmp_path / "calls").exists, [tmp_path])
        time.sleep(0.2)  # the stand-in sets its trap
        job.send_signal(number)
        assert job.wait(60) == 0
    finally:
        job.kill()
    assert (tmp_path / "calls").read_text(encoding="utf-8").splitlines() == [CALL, "asked", "scontrol requeue 7"]
