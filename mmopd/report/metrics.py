"""Metrics of a run: one JSON line per step in `metrics.jsonl`. `mmopd.report.loggers` sends them elsewhere.

`METRICS` defines each name; a name that it does not define is refused.
"""

import json
import math
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mmopd.errors import DataError

METRICS: Mapping[str, str] = {
    "step": "number of the step, from 0",
    "seconds": "wall time of the step",
    "seconds/*": "wall time of a part of the step (rollout, update, sync, held_out), and of the checkpoint before "
    "the step",
    "return": "mean over responses of R, the mean over tokens of log pi_T - log pi_student (Eq. 5), before "
    "calibration; nats",
    "return/*": "the same over the right responses, and over the wrong ones",
    "reverse_kl": "mean over tokens of log pi_student - log pi_T on the student's own tokens; nats",
    "reverse_kl/*": "the same over the responses to a task's prompts",
    "reverse_kl_teacher/*": "the same over the responses that a teacher scored (a+b: scored together by two)",
    "entropy_estimate": "mean over sampled tokens of -log pi_student; estimates the policy's mean entropy if sampling "
    "uses temperature 1 and all tokens; nats",
    "correct/*": "share of right responses among those with a known outcome: of all sampled responses, and of those in "
    "the loss",
    "accuracy/*": "share of right responses of a task, among those with a known outcome",
    "responses": "responses sampled",
    "share/*": "kept, balanced_away, masked, absent, unknown as shares of the responses sampled",
    "kept": "responses in the loss",
    "balanced_away": "responses left out by the online balance",
    "masked": "responses left out by the margin mask",
    "absent": "responses without a score",
    "absent/*": "the same by cause: timeout, status, ids, non_finite, connection, malformed, view",
    "visual_advantage/*": "mean over responses of the mean over tokens of log pi_T with minus without the image, by "
    "task; nats",
    "scored_blind": "responses that have both scores, with and without the image",
    "absent_blind": "responses that should have both scores and lack one",
    "scoring/requests": "requests sent to teachers",
    "scoring/reused": "scores that needed no request, because the same was requested before",
    "scoring/beyond_head": "likeliest tokens of teachers that the student's head has no row for; they count as rest",
    "scoring/unshared": "replies of servers without mmopd's plugin: they compute a prompt anew for each response",
    "scoring/hedged": "requests sent again to another replica, because the first was late",
    "scoring/failed/*": "requests that failed, by cause; another replica may have answered",
    "unknown": "responses without an outcome",
    "unknown/*": "the same by cause: timeout, verifier_process_died, the_answer_key, no_verifier, judge, "
    "no_package_numpy, the name of an exception, ...",
    "truncated": "share of responses that ended at the token limit",
    "token_clipped": "share of tokens left out because the log-probs are `log_ratio_clip` or more apart",
    "response_length": "mean number of tokens of a response, end token included",
    "loss": "loss of the objective",
    "objective/*": "diagnostics of an objective of the workspace, under the names that it chooses",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate",
    "clip_fraction": "share of trained tokens whose ratio was clipped",
    "trained_tokens": "response tokens in the loss",
    "skipped_updates": "updates that were skipped because loss or gradient was not finite",
    "packing": "share of the computed tokens that are not padding",
    "sharing": "tokens of all prompts and responses, divided by the computed tokens: responses that share a prompt "
    "compute it once",
    "order_consistency/*": "share of two-sided groups whose right responses have the higher return, before and after "
    "calibration",
    "order_delta/*": "share of two-sided groups whose margin reaches delta, before and after calibration",
    "two_sided_groups/*": "groups with right and wrong responses, before and after calibration",
    "margin/*": "margin of the two-sided groups before and after calibration: mean, and percentiles; nats",
    "shift": "mean over the kept responses of the absolute change of a token's reward by the calibration; nats",
    "mismatch": "largest |log-prob by the engine - log-prob by the trainer| of a trained token, before the update; "
    "nats",
    "mismatch_mean": "mean of the same over those tokens; nats",
    "staleness": "mean age of the weights that sampled a token, in updates",
    "rollout_seconds": "wall time of the step's rollouts, first request to last score, including the time in which the "
    "previous step is trained",
    "probe": "largest |log-prob by the engine - log-prob by the trainer| of the probe, after the weight sync; nats",
    "epoch/*": "number of passes of the plan through a source",
    "replaced/*": "rows of a source that could not be used since the start; other rows of the source replaced them",
    "held_out/*": "share of right responses to a source's held-out rows, after the step's update (evaluate)",
    "held_out_error/*": "standard error of the same over rows",
    "held_out_cut": "responses to held-out rows that ended at the token limit",
    "held_out_unknown": "responses to held-out rows without an outcome",
    "held_out_failed": "1 if an engine was lost during the evaluation, so that it has no score; otherwise 0",
    "suite/*": "score of a benchmark after the step's update (evaluate.suite); 0-100",
    "suite_error/*": "standard error of the same",
    "suite_failed": "benchmarks of evaluate.suite without a score; RUN/logs/rank0.log says why",
    "memory/*": "memory in use, in GiB: of rank 0's process, of its machine (host), of its GPU (gpu)",
    "loggers/failed/*": "calls of a logger that failed or took too long, since the start of the run; none: not written",
}


def documented(name: str) -> bool:
    """Return true if `METRICS` has the name, or a pattern for it."""
    return name in METRICS or any("*" in pattern and fnmatchcase(name, pattern) for pattern in METRICS)


class JsonLines:
    """A file of JSON lines with a `step` each; a run appends to it and can be resumed.

    Args:
        path: the file; rows of step `done` and later, and a line that a kill cut short, are removed from it. Another
            file takes its place then, which tells a `Tail` that reads it.
        done: number of steps to keep.

    Raises:
        DataError: a line among those to keep is damaged.
    """

    def __init__(self, path: Path, done: int) -> None:
        keep = b""
        if path.exists():
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n") or _row(path, number, line)["step"] >= done:
                        break
                    keep += line
            if len(keep) < path.stat().st_size:
                part = path.with_suffix(".partial")
                part.write_bytes(keep)
                part.replace(path)
        self._file = path.open("ab")

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a line and flush it, so that readers see it and a kill does not lose it."""
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Tail:
    """Reads what is appended to a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin = 0  # bytes read so far
        self._inode: int | None = None  # of the file that was read

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the rows that are new, and true if another file has come into the place of the one read so far.

        The rows are then those of the whole new file.
        """
        if not self._path.exists():
            return [], False
        with self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            again = self._inode not in {None, inode}
            if again:
                self._begin = 0
            self._inode = inode
            file.seek(self._begin)
            lines = [line for line in file if line.endswith(b"\n")]
        self._begin += sum(map(len, lines))
        return [json.loads(line) for line in lines], again


class MetricsWriter(JsonLines):
    """Writes `metrics.jsonl` of a run.

    Args:
        path: the file.
        done: steps of the checkpoint from which a run continues; values of later steps are removed.
    """

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the values of a step; one that is not finite is null.

        Raises:
            ValueError: `METRICS` has no such name.
        """
        for name in metrics:
            if not documented(name):
                raise ValueError(f"metric {name!r} is not explained in METRICS of {__name__}")
        numbers = {name: float(value) for name, value in metrics.items() if name != "step"}
        self.append({"step": step} | {name: value if math.isfinite(value) else None for name, value in numbers.items()})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines, without an incomplete last line; an empty list if there is no file.

    Raises:
        DataError: a line is damaged.
    """
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [_row(path, number, line) for number, line in enumerate(file, 1) if line.endswith(b"\n")]


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(line)
        if isinstance(row["step"], int):
            return row
        problem = f"step {row['step']!r} is no number"
    except KeyError:
        problem = "it has no step"
    except (ValueError, TypeError, RecursionError) as error:
        problem = f"it is no JSON object ({error})"
    raise DataError(f"{path}: line {number} is damaged: {problem}; delete this line to go on without it")
