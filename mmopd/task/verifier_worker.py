"""The process of `mmopd.task.verifier_pool`: reads questions as lines of JSON, writes outcomes, ends with its input."""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import IO

import psutil

from mmopd.records import UNKNOWN, Outcome
from mmopd.task.base import Task
from mmopd.task.load import load_tasks, tasks_of

LONGEST = 200  # characters of a reason
MEMORY = 4 << 30  # bytes of address space beyond what loading took: `9**9**9` must not exhaust the machine


def main(workspace: Path | None, module: str = "") -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a verifier prints must not be taken for a reply
    tasks = tasks_of(module) if module else load_tasks(workspace)
    limit = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    send(replies, "ready")
    for line in sys.stdin:
        task, response, answer, timeout = json.loads(line)
        signal.setitimer(
            signal.ITIMER_REAL, timeout + 1
        )  # the parent kills earlier; this is for when the parent is gone
        outcome = outcome_of(tasks[task], response, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(replies, json.dumps([outcome.value if outcome.known else None, outcome.reason[:LONGEST]]))


def send(replies: IO[str], line: str) -> None:
    """Write a line to the parent."""
    replies.write(f"{line}\n")
    replies.flush()


def outcome_of(task: Task, response: str, answer: str) -> Outcome:
    """Return the task's verdict; unknown, with a reason, where its verifier raises or returns no valid outcome."""
    try:
        outcome = task.verify(response, answer)
        if not isinstance(outcome, Outcome) or (outcome.known and not 0 <= outcome.value <= 1):
            raise TypeError(f"the verifier of {task.name!r} returned {outcome!r}, which is not an Outcome from 0 to 1")
    except Exception as error:
        return Outcome(UNKNOWN, f"{type(error).__name__}: {error}")
    return outcome


if __name__ == "__main__":
    given = sys.argv[1:]
    if given[:1] == ["--module"]:
        main(None, given[1])
    else:
        main(Path(given[0]) if given else None)
