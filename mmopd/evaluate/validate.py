"""Checks that an lmms-eval run counts, from its results and samples: neither is enough alone."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmopd.config.suite import LmmsBenchmark
from mmopd.evaluate import second_rule
from mmopd.evaluate.score import InvalidRunError, Measured
from mmopd.evaluate.verdicts import over_questions, verdict

MAX_EMPTY = 0.1  # share of answers that may be empty
PLACEHOLDER = "[LMMS_EVAL_"  # start of the text that lmms-eval writes for an answer that it did not get
RETRIED = "RetryError["
ERROR = re.compile(r"[\w.]+(Error|Exception): ")
ROUNDED = 1e-4  # of a score; some tasks round theirs
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def validate(output: Path, task: str, benchmark: LmmsBenchmark, rows: int | None) -> Measured:
    """Read the results below `output`, a folder that was empty before the run.

    Args:
        rows: number of questions of the task, if it is known from elsewhere.

    Raises:
        InvalidRunError: the run does not count; says why.
    """
    files = sorted(output.rglob("*_results.json"))
    if len(files) != 1:
        raise InvalidRunError(f"{len(files)} results files, expected one")
    results = json.loads(files[0].read_text(encoding="utf-8"))
    score = _number(results, task, benchmark.metric)
    if not 0 <= score <= benchmark.scale * (1 + 1e-9):
        raise InvalidRunError(
            f"{benchmark.metric} is {score:g}, outside 0 to {benchmark.scale:g} (`scale` of the benchmark)"
        )
    samples = _check_samples(output, task, _expected(results, task, benchmark, rows))
    name, _, filtered = benchmark.metric.partition(",")
    stderr = results["results"][task].get(f"{name}_stderr,{filtered}")
    if not _is_number(stderr):
        stderr = _error(samples, name, score, benchmark.scale)
    to_percent = 100 / benchmark.scale
    return Measured(
        score=round(score * to_percent, 6),
        stderr=round(stderr * to_percent, 6) if _is_number(stderr) else None,
        n=len(samples),
        versions={"task": str(results.get("versions", {}).get(task, ""))},
        sent=_sent(results["configs"][task]),
        more=json.loads((output / second_rule.FILE).read_text(encoding="utf-8")) if benchmark.second_rule else {},
    )


def last_words(log: Path) -> str:
    """Return the last line of a log that is neither empty nor a progress bar, to be used in a reason.

    lmms-eval tries some work again, and names only the kind of the error at the end: then the error itself is returned.
    """
    text = ANSI.sub("", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.strip() for line in reversed(text.splitlines()) if line.strip() and "%|" not in line]
    if lines and RETRIED in lines[0]:
        lines = [line for line in lines if ERROR.match(line) and RETRIED not in line] or lines
    return lines[0][:300] if lines else "nothing was logged"


def _sent(task: dict[str, Any]) -> dict[str, Any]:
    """Return what lmms-eval's client `openai` sends for a task, with its defaults where the task says nothing."""
    settings = {"max_new_tokens": 1024, "temperature": 0, **(task.get("generation_kwargs") or {})}
    return {
        "max_tokens": settings["max_new_tokens"],
        "temperature": settings["temperature"],
        "responses": task.get("repeats", 1),
    }


def _number(results: dict[str, Any], task: str, metric: str) -> float:
    measured = results.get("results", {}).get(task)
    if not isinstance(measured, dict):
        raise InvalidRunError(f"no results for task {task!r}")
    if metric not in measured:
        there = ", ".join(key for key, value in measured.items() if _is_number(value) and "_stderr" not in key)
        raise InvalidRunError(f"no metric {metric!r}; the results have: {there or 'none'}")
    if not _is_number(measured[metric]):
        raise InvalidRunError(f"{metric} is {measured[metric]!r}, not a finite number")
    return float(measured[metric])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _expected(results: dict[str, Any], task: str, benchmark: LmmsBenchmark, rows: int | None) -> int:
    """Return how many questions should have been asked; refuse a run that asked another number."""
    counts = results.get("n-samples", {}).get(task, {})
    expected = int(rows if rows is not None else counts.get("original", 0))
    if benchmark.limit is not None:
        expected = min(expected, benchmark.limit)
    if expected <= 0 or counts.get("effective") != expected:
        raise InvalidRunError(f"{counts.get('effective')} questions were asked, expected {expected}")
    return expected


def _error(samples: list[dict[str, Any]], metric: str, score: float, scale: float) -> float | None:
    """Return the standard error of a score for which lmms-eval gives none; None if it is not the mean of verdicts."""
    verdicts = [found for sample in samples if (found := verdict(sample, metric)) is not None]
    if len(verdicts) < len(samples):
        return None
    mean, error = over_questions(verdicts)
    return error * scale if error is not None and abs(mean * scale - score) < ROUNDED * scale else None


def _check_samples(output: Path, task: str, expected: int) -> list[dict[str, Any]]:
    """Return the samples, after checking that each is an answer."""
    files = sorted(output.rglob(f"*_samples_{task}.jsonl"))
    if len(files) != 1:
        raise InvalidRunError(f"{len(files)} files of samples, expected one")
    with files[0].open(encoding="utf-8") as lines:  # splitlines would also split at U+2028
        samples = [json.loads(line) for line in lines]
    if len(samples) != expected:
        raise InvalidRunError(f"{len(samples)} answers for {expected} questions")
    answers = ["".join(_texts(s["resps"] if "resps" in s else s.get("filtered_resps"))) for s in samples]
    failed = [a for a in answers if a.startswith(PLACEHOLDER)]
    if failed:
        raise InvalidRunError(f"{len(failed)} of {expected} requests failed: {failed[0][:200]}")
    empty = sum(not a.strip() for a in answers)
    if empty > MAX_EMPTY * expected:
        raise InvalidRunError(f"{empty} of {expected} answers are empty")
    return samples


def _texts(value: object) -> Iterator[str]:
    """Yield the strings of a nested list."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
