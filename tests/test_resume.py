"""Runs that are interrupted in several ways, one after the other, end like an uninterrupted run: real servers, two
ranks, fp32 on the CPU.
"""

import os
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_end_to_end import MARK, NO_SUITE, SMALL
from test_end_to_end import Command as Started

from mmopd.catalog import shipped
from mmopd.errors import STOPPED
from mmopd.report.metrics import read_lines
from mmopd.runtime.run_folder import RunFolder
from mmopd.serving import endpoint
from mmopd.teacher import identity
from mmopd.teacher.identity import Record
from mmopd.train.checkpoint_files import read_state

pytestmark = pytest.mark.usefixtures("server")
Command = partial(Started, forked=True)
TIMEOUT = 300  # seconds; enough for a busy machine
STEPS = [
    "train.steps=10",
    "train.checkpoint_every=2",
    f"train.timeout={TIMEOUT}",
    "algorithm.difficulty=null",
    "student.replicas=2",
    NO_SUITE,
]
TEACHERS = "teachers.json"
ELSEWHERE = ("--endpoints", TEACHERS)
OF_THE_MACHINE = ("seconds", "rollout_seconds", "memory", "scoring")  # metrics that differ between repetitions


@pytest.fixture(scope="module", autouse=True)
def teachers(workspace: Path) -> Iterator[None]:
    """Serve the teachers for all runs together, as if on nodes of their own."""
    serving = Command(workspace, "serve", str(shipped() / "teachers" / "demo.yaml"), "--out", TEACHERS)
    serving.wait_for((workspace / TEACHERS).is_file)
    yield
    serving.process.send_signal(signal.SIGTERM)
    whole(serving)


def train(workspace: Path, name: str, *more: str) -> Started:
    return Command(workspace, "train", "recipes/small.yaml", *SMALL, *STEPS, *more, "--run", f"runs/{name}", *ELSEWHERE)


def resume(workspace: Path, name: str) -> Started:
    return Command(workspace, "train", "--resume", f"runs/{name}", *ELSEWHERE)


def steps(run: RunFolder) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k.partition("/")[0] not in OF_THE_MACHINE} for row in read_lines(run.metrics)
    ]


def whole(command: Started, expected: int = 0) -> str:
    status, output = command.finish()
    assert status == expected, output
    command.assert_nothing_survives()
    return output


@pytest.fixture(scope="module")
def straight(workspace: Path) -> RunFolder:
    whole(train(workspace, "straight"))
    return RunFolder(workspace / "runs" / "straight")


def kill_engine(run: RunFolder, how: signal.Signals = signal.SIGKILL) -> None:
    """Kill the API server of the student's last engine, or send it another signal."""
    students, _ = endpoint.load_by_role(run.endpoints)
    port = urlsplit(students[-1].url).port
    (pid,) = {
        c.pid
        for c in psutil.net_connections("tcp4")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid
    }
    os.kill(pid, how)


@pytest.fixture(scope="module")
def stopped(workspace: Path) -> tuple[RunFolder, str, float]:
    """Run until one of two engines is lost, and SIGTERM a little later. Returns the run, its output, and the seconds
    until it ended.
    """
    run, command = RunFolder(workspace / "runs" / "stopped"), train(workspace, "stopped")
    command.wait_for(lambda: len(read_lines(run.metrics)) >= 1)
    time.sleep(random.uniform(0, 2))
    kill_engine(run)
    command.wait_for(lambda: len(read_lines(run.metrics)) >= 3)
    time.sleep(random.uniform(0, 2))
    asked = time.monotonic()
    command.process.send_signal(signal.SIGTERM)
    return run, whole(command, STOPPED), time.monotonic() - asked


def test_sigterm_ends_the_run_after_its_step_with_a_checkpoint_and_a_status_of_its_own(
    stopped: tuple[RunFolder, str, float],
) -> None:
    run, output, seconds = stopped
    done = len(steps(run))
    assert 3 <= done < 10
    assert seconds < TIMEOUT
    assert f"stopped after {done} steps as requested; continue with `mmopd train --resume runs/stopped`" in output
    assert (run.checkpoints / f"step-{done:08d}" / "manifest.json").is_file()
    assert not run.export.exists()


@pytest.fixture(scope="module")
def crashed(stopped: tuple[RunFolder, str, float], workspace: Path) -> tuple[RunFolder, int, str]:
    """Resume that run until its second rank is killed. Returns the run, its number of steps, and its output."""
    run, _, _ = stopped
    done = len(steps(run))
    command = resume(workspace, "stopped")
    command.wait_for(lambda: len(steps(run)) > done)
    time.sleep(random.uniform(0, 1))
    (rank,) = (p for p in psutil.process_iter(["cmdline", "environ"]) if is_rank(p, 1, command.mark))
    rank.kill()
    status, output = command.finish()
    assert status == 2, output
    command.assert_nothing_survives()
    return run, len(steps(run)), output


def is_rank(process: psutil.Process, rank: int, mark: str) -> bool:
    """Return whether a process is that training rank of the run with this mark, and not its guard."""
    command, env = process.info["cmdline"] or [], process.info["environ"] or {}
    return command[1:4] == ["-P", "-m", "mmopd.train.rank"] and (env.get("RANK"), env.get(MARK)) == (str(rank), mark)


def test_a_rank_that_is_killed_ends_the_run_and_is_named(crashed: tuple[RunFolder, int, str]) -> None:
    _, _, output = crashed
    assert "rank1 ended with status 137" in output


@pytest.fixture(scope="module")
def resumed(workspace: Path, crashed: tuple[RunFolder, int, str]) -> tuple[RunFolder, int, int]:
    """Resume that run, kill it as a whole at a random moment, and resume it to its end. Returns the run, and the steps
    in which rank and run were killed.
    """
    run, died, _ = crashed
    command = resume(workspace, "stopped")
    command.wait_for(lambda: len(steps(run)) > died)
    time.sleep(random.uniform(0, 4))
    command.process.send_signal(signal.SIGKILL)
    command.process.wait()
    command.assert_nothing_survives()
    killed = len(steps(run))
    whole(train(workspace, "stopped", "--resume-or-start"))
    return run, died, killed


def test_an_engine_that_dies_is_started_again(stopped: tuple[RunFolder, str, float]) -> None:
    run, output, _ = stopped
    assert "student-2: ended with status" in output
    assert (run.logs / "servers.log").read_text(encoding="utf-8").count("server restarted: student") == 1


def test_an_interrupted_run_repeats_the_uninterrupted_one(
    straight: RunFolder, resumed: tuple[RunFolder, int, int]
) -> None:
    run, died, killed = resumed
    assert len(steps(straight)) == 10
    teachers = identity.load(run.teachers)
    assert teachers is not None
    assert teachers == identity.load(straight.teachers)
    assert all(one.fingerprint.hashed for one in teachers.teachers.values())  # by the file of `mmopd serve`
    assert msgspec.convert(read_state(run.checkpoints / "step-00000010")["teachers"], Record) == teachers
    assert 3 <= died <= killed <= 10
    for step, (a, b) in enumerate(zip(steps(straight), steps(run), strict=True)):
        assert a == b, f"step {step} of a run that lost a rank in step {died} and was killed in step {killed}"
    ours, theirs = (load_file(folder.export / "model.safetensors") for folder in (straight, run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(w, theirs[name]) for name, w in ours.items())


def test_the_student_of_a_checkpoint_can_be_had_as_a_folder_also_by_another_number_of_ranks(
    workspace: Path, straight: RunFolder
) -> None:
    whole(Command(workspace, "export", "runs/straight", "--ranks", "1", "--out", "tenth"))
    exported = load_file(workspace / "tenth" / "model.safetensors")
    end = load_file(straight.export / "model.safetensors")
    assert exported.keys() == end.keys()
    assert all(torch.equal(w, exported[name]) for name, w in end.items())
    assert "10 of 10 steps" in (workspace / "tenth" / "README.md").read_text(encoding="utf-8")
    status, output = Command(workspace, "export", "runs/straight", "--step", "2").finish()
    assert status == 6  # CheckpointError
    assert "no checkpoint of step 2; checkpoints: 8, 10" in output


def test_a_launchers_ranks_learn_the_same_and_end_after_their_step_though_it_would_end_them_at_once(
    workspace: Path, straight: RunFolder
) -> None:
    run = RunFolder(workspace / "runs" / "launched")
    deepspeed = (
        f"{sys.executable} -m deepspeed.launcher.runner --num_gpus 2 --module"  # what the script `deepspeed` runs
    )
    command = train(workspace, "launched", "train.steps=1000", "--launcher", deepspeed)
    command.wait_for(lambda: len(read_lines(run.metrics)) >= 1)
    command.process.send_signal(signal.SIGUSR1)
    output = whole(command, STOPPED)
    done = len(steps(run))
    assert steps(run)[:10] == steps(straight)[:done]
    assert f"stopped after {done} steps as requested" in output
    assert (run.checkpoints / f"step-{done:08d}" / "manifest.json").is_file()


def test_a_run_stops_in_time_for_its_checkpoint(workspace: Path) -> None:
    run = RunFolder(workspace / "runs" / "limited")
    output = whole(train(workspace, "limited", "train.minutes=0.5", "train.steps=1000"), STOPPED)
    late = float(run.until.read_text(encoding="utf-8")) + 20  # a busy machine may take longer for a step than before
    done = len(steps(run))
    assert f"stopped after {done} steps by train.minutes" in output
    saved = run.checkpoints / f"step-{done:08d}" / "manifest.json"
    assert done == 1 or saved.stat().st_mtime < late  # one step is made in any case


def test_a_run_ahead_learns_from_weights_that_are_one_update_older_and_survives_its_engine(workspace: Path) -> None:
    run, command = (
        RunFolder(workspace / "runs" / "ahead"),
        train(workspace, "ahead", "rollout.async_steps=1", "student.replicas=1"),
    )
    command.wait_for(lambda: len(read_lines(run.metrics)) >= 4)
    kill_engine(run)
    whole(command)
    ages = [row["staleness"] for row in steps(run)]
    assert len(ages) == 10
    assert ages[0] == 0
    assert all(0 <= age <= 1 for age in ages)
    assert max(ages) > 0.5
    assert (
        max(row["mismatch_mean"] for row in steps(run)) > 1e-6 > steps(run)[0]["mismatch_mean"]
    )  # weights that an update changes


def test_an_engine_that_hangs_ends_the_run_within_its_timeout_and_is_named(workspace: Path) -> None:
    run, command = RunFolder(workspace / "runs" / "hung"), train(workspace, "hung", "train.timeout=20")
    command.wait_for(lambda: len(steps(run)) >= 3)
    kill_engine(run, signal.SIGSTOP)
    begin = time.monotonic()
    status, output = command.finish()
    assert status == 2, output
    assert time.monotonic() - begin < 60
    assert re.search(r"Error: student-2: /|engine student-2 could not", output), output
    command.assert_nothing_survives()
