"""From responses to a score: thoughts are removed, the judge decides, and what is incomplete has no score."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmopd.errors import UserError
from mmopd.evaluate.sampled.base import Judge, Problem, Sample, Verdict
from mmopd.evaluate.sampled.passk import pass_at_k
from mmopd.evaluate.score import InvalidRunError, Measured, mean_and_error

END = "</think>"
BEGIN = "<think>"
UNFINISHED = Verdict(False, "the thought does not end")


def without_thoughts(text: str, *, opened: bool) -> str | None:
    """Return what a response says after its thoughts; None if a thought does not end.

    Args:
        opened: the prompt ends in the beginning of a thought.
    """
    head, end, tail = text.rpartition(END)
    if BEGIN in tail or (opened and not end):
        return None
    return tail if end else head + tail


def judge_all(problems: Sequence[Problem], samples: Sequence[Sample], judge: Judge, *, opened: bool) -> list[Verdict]:
    """Return a verdict for each response; one whose thought does not end is wrong, and no judge is asked.

    Raises:
        InvalidRunError: the judge cannot work.
    """
    answers = [without_thoughts(sample.text, opened=opened) for sample in samples]
    asked = [
        dataclasses.replace(sample, text=answer)
        for sample, answer in zip(samples, answers, strict=True)
        if answer is not None
    ]
    try:
        judged = judge.judge(problems, asked)
    except (UserError, RuntimeError, OSError) as error:
        raise InvalidRunError(f"the judge failed: {error}") from error
    if len(judged) != len(asked):
        raise InvalidRunError(f"the judge gave {len(judged)} verdicts for {len(asked)} responses")
    verdicts = iter(judged)
    return [UNFINISHED if answer is None else next(verdicts) for answer in answers]


def write(path: Path, samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> None:
    """Write a line of JSON for each response, with its verdict."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for sample, verdict in zip(samples, verdicts, strict=True):
            line = {**dataclasses.asdict(sample), "right": verdict.right, "reason": verdict.reason}
            file.write(json.dumps(line) + "\n")


def score(
    problems: Sequence[Problem], samples: Sequence[Sample], verdicts: Sequence[Verdict], *, n: int, ks: Sequence[int]
) -> Measured:
    """Return pass@1 as the mean over responses and problems, and pass@k (Eq. 15), with standard errors over problems.

    `more` of the result has pass@k, and `cut`: the percentage of responses that ended at the token limit or in a
    thought.

    Raises:
        InvalidRunError: a problem does not have n responses, or a verdict is unknown.
    """
    counts = Counter(sample.key for sample in samples)
    for problem in problems:
        if counts[problem.key] != n:
            raise InvalidRunError(f"problem {problem.key} has {counts[problem.key]} responses, and n is {n}")
    if unknown := [
        f"response {sample.i} to problem {sample.key}: {verdict.reason}"
        for sample, verdict in zip(samples, verdicts, strict=True)
        if verdict.right is None
    ]:
        raise InvalidRunError(f"{len(unknown)} of {len(samples)} verdicts are unknown; {unknown[0]}")
    right = Counter(sample.key for sample, verdict in zip(samples, verdicts, strict=True) if verdict.right)
    cut = sum(
        sample.finish == "length" or verdict is UNFINISHED for sample, verdict in zip(samples, verdicts, strict=True)
    )
    more: dict[str, float] = {}
    for k in ks:
        mean, error = mean_and_error([100 * pass_at_k(n, right[problem.key], k) for problem in problems])
        more |= {f"pass@{k}": mean} | ({} if error is None else {f"pass@{k}_stderr": error})
    mean, error = mean_and_error([100 * right[problem.key] / n for problem in problems])
    more["cut"] = 100 * cut / len(samples)
    return Measured(score=mean, stderr=error, n=len(problems), versions={}, sent={}, more=more)
