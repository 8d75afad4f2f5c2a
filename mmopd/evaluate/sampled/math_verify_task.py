"""Math-Verify as a task of the verifier pool, which imports this in its processes."""

import logging

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from mmopd.records import Outcome
from mmopd.task.base import Task


class _Warnings(logging.Handler):
    """Collects what Math-Verify warns of: it reports its own time limits in no other way."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.first = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the first message."""
        self.first = self.first or record.getMessage().split(":")[0]


def _verify(response: str, answer: str) -> Outcome:
    r"""Compare a response with an answer. Of a response, what is in `\boxed` comes first; it may also be plain."""
    logger = logging.getLogger("math_verify")
    said = _Warnings()
    logger.addHandler(said)
    try:
        gold = parse(f"${answer}$")
        if not gold:
            raise ValueError(f"the answer of the problem is not understood: {answer}")
        found = parse(response, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()])
        right = bool(found) and verify(gold, found)
    finally:
        logger.removeHandler(said)
    return Outcome(float(right), said.first if not right and said.first else "" if found else "no answer found")


TASKS = {"math_verify": Task("math_verify", "text", _verify)}
