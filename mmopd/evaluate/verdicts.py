"""Verdicts on single responses, as lmms-eval's tasks write them to its samples, and their mean and standard error."""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from statistics import fmean
from typing import Any, NamedTuple

from mmopd.evaluate.score import mean_and_error

FORMS = ("acc", "scores")  # keys of the verdict where a task writes more than a number


class Verdict(NamedTuple):
    """The verdict on a response, and the question that it answers; DynaMath asks several variants of one."""

    question: Hashable
    value: float


def verdict(sample: Mapping[str, Any], metric: str) -> Verdict | None:
    """Return the verdict on a response by its metric; None if the task writes none.

    Args:
        sample: a line of lmms-eval's samples.
        metric: without its filter.
    """
    found = sample.get(metric)
    variants_of = found.get("variant_id") if isinstance(found, Mapping) else None
    if isinstance(found, Mapping):
        found = next((found[form] for form in FORMS if form in found), None)
    if isinstance(found, list) and len(found) == 1:
        [found] = found
    if not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return Verdict(sample["doc_id"] if variants_of is None else variants_of, float(found))


def over_questions(verdicts: Iterable[Verdict]) -> tuple[float, float | None]:
    """Return the mean over questions of the mean of their verdicts, and its standard error; None for one question."""
    by_question: dict[Hashable, list[float]] = defaultdict(list)
    for one in verdicts:
        by_question[one.question].append(one.value)
    return mean_and_error([fmean(values) for values in by_question.values()])
