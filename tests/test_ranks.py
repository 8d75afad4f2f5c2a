"""The rank that is named when a run ends early; shell commands stand in for ranks."""

import time
from pathlib import Path

import psutil
import pytest

from mmopd.errors import UserError
from mmopd.runtime.processes import Children
from mmopd.runtime.rank_processes import Pulses, check_ranks
from mmopd.runtime.watchdog import HUNG, LAST, LEFT, WAITED, Watchdog, pulse_of


def blamed(tmp_path: Path, *ends: str, stopping: bool = False, timeout: float = 20) -> str:
    """Return the message of the launcher when its ranks end like these shell commands."""
    with Children() as children:
        ranks = [children.start(f"rank{n}", ["sh", "-c", end], tmp_path / f"{n}.log") for n, end in enumerate(ends)]
        ranks[0].wait(30)
        try:
            check_ranks(ranks, timeout=timeout, stopping=stopping)
        except UserError as error:
            return str(error)
        finally:
            for process in psutil.Process().children(recursive=True):
                process.resume()  # a stopped one would not hear that it has to end
    return ""


def test_of_ranks_that_take_each_other_along_the_one_that_knows_why_is_named(tmp_path: Path) -> None:
    said = blamed(tmp_path, "exit 1", "echo error: no space; sleep 0.3; exit 2", "exit 1")
    assert said.startswith("rank1 ended with status 2; ")
    assert said.endswith("error: no space")
    assert blamed(tmp_path, "exit 1", "kill -9 $$").startswith("rank1 ended with status 137")


def test_a_rank_that_hangs_is_named_and_not_the_one_that_has_waited_for_it(tmp_path: Path) -> None:
    said = blamed(tmp_path, f"exit {WAITED}", f"sleep 2; echo at step 7, update; exit {HUNG}")
    assert said.startswith(f"rank1 ended with status {HUNG}; ")
    assert said.endswith("at step 7, update")


def test_ranks_that_were_left_are_never_blamed_before_the_one_that_left(tmp_path: Path) -> None:
    crash = "echo RuntimeError: CUDA out of memory; sleep 2; exit 1"
    assert blamed(tmp_path, f"exit {LEFT}", crash).startswith("rank1 ended with status 1")
    ring = (f"exit {LEFT}", f"sleep 2; exit {HUNG}", f"exit {WAITED}")  # the last one gave up and ended the first
    assert blamed(tmp_path, *ring).startswith(f"rank1 ended with status {HUNG}")


def test_a_rank_that_nccl_has_ended_for_waiting_is_not_taken_for_the_one_that_hangs(tmp_path: Path) -> None:
    aborted = "echo '[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7'; kill -ABRT $$"
    assert blamed(tmp_path, aborted, f"sleep 2; exit {HUNG}").startswith(f"rank1 ended with status {HUNG}")
    assert blamed(tmp_path, "kill -ABRT $$", f"exit {LEFT}").startswith("rank0 ended with status 134")


def test_a_rank_that_does_not_even_end_itself_is_named(tmp_path: Path) -> None:
    said = blamed(tmp_path, f"exit {WAITED}", "kill -STOP $$", timeout=3)
    assert said.startswith("rank1 has not answered for train.timeout = 3 s")


def test_a_rank_that_was_asked_to_stop_before_it_could_listen_has_not_failed(tmp_path: Path) -> None:
    assert blamed(tmp_path, "kill $$", stopping=True) == ""
    assert blamed(tmp_path, "kill $$").startswith("rank0 ended with status 143")


def test_a_rank_that_is_stopped_and_that_no_other_misses_ends_the_run(tmp_path: Path) -> None:
    log, timeout = tmp_path / "rank0.log", 0.5
    with Children() as children:
        rank = children.start("rank0", ["sh", "-c", "echo at step 7; sleep 60"], log)
        pulses = Pulses([rank], timeout)

        def look(seconds: float, watchdog: Watchdog | None = None) -> None:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if watchdog is not None:
                    watchdog.beat()
                pulses.check()
                time.sleep(0.02)

        look(2 * LAST * timeout)  # a rank that is starting
        with Watchdog(0, timeout, pulse_of(log)) as watchdog:
            look(2 * LAST * timeout, watchdog)
        look(0.8 * LAST * timeout)
        with pytest.raises(UserError, match=r"(?s)rank0 has given no sign of life for .*at step 7$"):
            look(10)
