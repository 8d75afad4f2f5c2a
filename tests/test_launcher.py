"""Ranks that another launcher starts: what the launcher gets, what it must set, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmopd.cli import app
from mmopd.errors import UserError
from mmopd.runtime.processes import Children
from mmopd.runtime.rank_processes import start_ranks
from mmopd.train.distributed import place
from mmopd.train.rank import check_place, is_here

ECHO = """import json, os, sys
names = "MASTER_ADDR", "MASTER_PORT", "HF_HUB_OFFLINE", "RANK"
print(json.dumps([sys.argv[1:], {name: os.environ.get(name) for name in names}]))
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_launcher_is_given_the_module_the_run_and_where_to_meet(host: str, tmp_path: Path) -> None:
    what = ["mmopd.train.rank", str(tmp_path), "added"]
    with Children() as children:
        (launcher,) = start_ranks(what, 2, tmp_path, children, launcher=[sys.executable, "-c", ECHO], host=host)
        assert launcher.wait(60) == 0
    arguments, env = json.loads(launcher.log.read_text(encoding="utf-8"))
    assert arguments == ["mmopd.train.rank", str(tmp_path), "added"]
    assert (env["MASTER_ADDR"] == "127.0.0.1") == (host == "127.0.0.1")
    assert env["MASTER_PORT"].isdecimal()
    assert env["HF_HUB_OFFLINE"] == "1"


def test_a_task_of_srun_is_a_rank_and_a_shell_of_srun_is_alone() -> None:
    task = {"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "11", "SLURM_LOCALID": "6", "SLURM_NTASKS": "16"}
    assert place(task) == {"RANK": "9", "WORLD_SIZE": "11", "LOCAL_RANK": "6"}
    for env in ({}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}):
        alone = place(env)
        assert (alone["RANK"], alone["WORLD_SIZE"], alone["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_ranks_that_could_not_work_are_refused_before_they_start() -> None:
    check_place(2, "127.0.0.1", [("a", True), ("a", True)])
    check_place(3, "a", [("a", True), ("b", False), ("b", False)])
    with pytest.raises(UserError, match=r"started 2 ranks, and train\.ranks is 3"):
        check_place(3, "127.0.0.1", [("a", True), ("a", True)])
    with pytest.raises(UserError, match=r"ranks run on a, b.*mmopd train --host 0\.0\.0\.0"):
        check_place(2, "127.0.0.1", [("a", True), ("b", True)])
    with pytest.raises(UserError, match=r"rank 0 is on b, but the student's engine is on a.*put a first"):
        check_place(2, "a", [("b", False), ("a", True)])


def test_this_machine_is_known_by_its_addresses() -> None:
    assert is_here("127.0.0.1")
    assert is_here("localhost")
    assert not is_here("192.0.2.1")  # an address reserved for documentation (RFC 5737)
    assert not is_here("no-such-host.invalid")


def test_a_launcher_that_is_not_there_is_refused_before_a_run_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "recipes/demo.yaml", "--run", "r", "--launcher", "no-such-launcher --hostfile hosts"]
    with pytest.raises(UserError, match="there is no command 'no-such-launcher'"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not (tmp_path / "r").exists()
