"""Metrics of a run: one JSON line per step in `metrics.jsonl`, and the same numbers for TensorBoard.

`METRICS` is the one place that says what each name means; a name that is not there is refused.
"""

import json
import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, Self

METRICS: Mapping[str, str] = {
    "step": "number of the step, from 0",
    "seconds": "wall time of the step",
    "seconds/*": "wall time of a part of it: rollout, update, sync; and of the checkpoint before it",
    "return": "mean over responses of R, the mean over tokens of log pi_T - log pi_student (Eq. 5), before calibration; nats",
    "return/*": "the same over the right and over the wrong responses",
    "reverse_kl": "mean over tokens of log pi_student - log pi_T on the student's own tokens; nats",
    "reverse_kl/*": "the same over the responses to a task's prompts",
    "reverse_kl_teacher/*": "the same over the responses that a teacher scored (a+b where two scored together)",
    "entropy_estimate": "mean over sampled tokens of -log pi_student; where sampling is at temperature 1 from all tokens, it estimates "
    "the policy's mean entropy; nats",
    "correct/*": "share of right responses of those with a known outcome: of all that were sampled, and of those in the loss",
    "accuracy/*": "share of right responses of a task, of those with a known outcome",
    "responses": "responses sampled",
    "share/*": "kept, balanced_away, masked, absent, unknown as shares of the responses sampled",
    "kept": "responses in the loss",
    "balanced_away": "responses left out by the online balance",
    "masked": "responses left out by the margin mask",
    "absent": "responses without a score",
    "absent/*": "the same by cause: timeout, status, ids, non_finite, connection, malformed, view",
    "visual_advantage/*": "mean over responses of the mean over tokens of log pi_T with minus without the image, by task; nats",
    "scored_blind": "responses that have both scores, with and without the image",
    "absent_blind": "responses that were to have both, and lack one",
    "scoring/requests": "requests sent to teachers",
    "scoring/reused": "scores that cost no request: the same was asked before",
    "scoring/hedged": "requests sent a second time, to another replica, because the first was late",
    "scoring/failed/*": "requests that failed, by cause; another replica may have answered",
    "unknown": "responses without an outcome",
    "unknown/*": "the same by cause: timeout, verifier_process_died, the_answer_key, no_verifier, judge, the name of an exception, ...",
    "truncated": "share of responses that ended at the token limit",
    "token_clipped": "share of tokens left out because the log-probs are `log_ratio_clip` or more apart",
    "response_length": "mean tokens of a response, end token included",
    "loss": "loss of the objective",
    "objective/*": "diagnostics that an objective of the workspace gives its own names",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate",
    "clip_fraction": "share of trained tokens whose ratio was clipped",
    "trained_tokens": "response tokens in the loss",
    "skipped_updates": "updates that were not made, since loss or gradient was not finite",
    "packing": "share of the tokens computed that are no padding",
    "sharing": "tokens of all prompts and responses, by those computed: a prompt is computed once for responses that share it",
    "order_consistency/*": "share of two-sided groups whose right responses have the higher return, before and after calibration",
    "order_delta/*": "share of two-sided groups whose margin reaches delta, before and after calibration",
    "two_sided_groups/*": "groups with right and wrong responses, before and after calibration",
    "margin/*": "margin of the two-sided groups before and after calibration: mean, and percentiles; nats",
    "shift": "mean over the kept responses of what the calibration adds to a token's reward, without its sign; nats",
    "mismatch": "largest |log-prob by the engine - log-prob by the trainer| of a trained token, before the update; nats",
    "mismatch_mean": "mean of it over those tokens; nats",
    "staleness": "by how many updates the weights that sampled a token are older than those that learn from it; mean",
    "rollout_seconds": "wall time of the step's rollouts, first request to last score, also while the step before is learnt from",
    "probe": "largest |log-prob by the engine - log-prob by the trainer| of the probe, after the weight sync; nats",
    "epoch/*": "how often the plan has been through a source",
    "replaced/*": "rows of a source that could not be used, since the start; others of it took their places",
    "memory/*": "memory in use, in GiB",
}


def documented(name: str) -> bool:
    """Whether `METRICS` has the name, or a pattern for it."""
    return name in METRICS or any("*" in pattern and fnmatchcase(name, pattern) for pattern in METRICS)


class JsonLines:
    """A file of JSON lines with a `step` each, that a run appends to and can be resumed.

    Args:
        path: the file; rows of step `done` and later, and a line that a kill cut short, are removed from it.
    """

    def __init__(self, path: Path, done: int) -> None:
        keep = 0
        if path.exists():
            with path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n") or json.loads(line)["step"] >= done:
                        break
                    keep += len(line)
        self._file = path.open("ab")
        self._file.truncate(keep)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a line and hand it to the system, so that a reader sees it and a kill does not lose it."""
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MetricsWriter:
    """Writes `metrics.jsonl` and `tensorboard/` of a run folder.

    Args:
        run: the run folder.
        done: steps of the checkpoint that a run goes on from; what was written for later steps is removed.
    """

    def __init__(self, run: Path, done: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # loads torch, which whoever reads metrics does not need

        self._lines = JsonLines(run / "metrics.jsonl", done)
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=done if done else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the numbers of a step; one that is not finite is null in the file and left out of TensorBoard.

        Raises:
            ValueError: a name that `METRICS` does not explain.
        """
        for name in metrics:
            if not documented(name):
                raise ValueError(f"metric {name!r} is not explained in METRICS of {__name__}")
        numbers = {name: float(value) for name, value in metrics.items() if name != "step"}
        self._lines.append(
            {"step": step} | {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        )
        for name, value in numbers.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        """Close both."""
        self._lines.close()
        self._board.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, without a last one that is not whole; none if there is no file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [json.loads(line) for line in file if line.endswith(b"\n")]
