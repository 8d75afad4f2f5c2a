"""The judge of mathematics: Math-Verify, in processes that are killed when they hang."""

import importlib.metadata
from collections.abc import Sequence

from mmopd.errors import UserError
from mmopd.evaluate.sampled.base import Problem, Sample, Verdict
from mmopd.task.verifier_pool import VerifierPool

TASKS = f"{__package__}.math_verify_task"
NAME = "math_verify"  # in TASKS
PACKAGES = ("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime", "sympy")  # that can change a verdict
TIMEOUT = 60.0  # seconds for a response; Math-Verify itself gives up a few seconds after it began


class MathVerify:
    """Judges responses by Math-Verify, with the answer of a problem as its reference.

    Its own limits hold, as in other projects: an answer that it cannot parse or compare within 5 seconds is wrong. A
    process that hangs in spite of them, or dies, is an unknown verdict.

    Raises:
        UserError: Math-Verify is not installed.
    """

    def __init__(self) -> None:
        try:
            self.version = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(f"{error.name} is not installed; `pip install 'mmopd[eval]'` installs it") from None

    def judge(self, problems: Sequence[Problem], samples: Sequence[Sample]) -> list[Verdict]:
        """Return a verdict for each sample, in order."""
        answers = {problem.key: str(problem.reference) for problem in problems}
        with VerifierPool(module=TASKS, timeout=TIMEOUT) as pool:
            futures = [pool.submit(NAME, sample.text, answers[sample.key]) for sample in samples]
            outcomes = [future.result() for future in futures]
        return [Verdict(outcome.value == 1 if outcome.known else None, outcome.reason) for outcome in outcomes]
