"""The benchmarks that mmopd samples itself, by name: data, prompt and judge of each."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mmopd.errors import ConfigError, DataError
from mmopd.evaluate.sampled.base import Judge, Problem
from mmopd.evaluate.sampled.mathematics import MathVerify
from mmopd.evaluate.sampled.source import Row, Source
from mmopd.settings_errors import suggest


@dataclass(frozen=True, slots=True)
class Known:
    """A benchmark: where its rows are, how a row becomes a problem, and who judges.

    `problem` may return None for a row that does not belong to it, such as one outside of a window of dates.
    """

    source: Source
    problem: Callable[[Row], Problem | None]
    judge: Callable[[], Judge]  # makes the judge; a UserError says what it needs and what is missing

    def problems(self, data: Path | None) -> tuple[Problem, ...]:
        """Return all problems, of a local file or of the published data.

        Raises:
            DataError: as `Source.read`; also if two problems have the same key, or there is none.
            UserError: the client of the hub is not installed.
        """
        found = tuple(problem for row in self.source.read(data) if (problem := self.problem(row)) is not None)
        where = str(data) if data else self.source.hub
        if not found:
            raise DataError(f"{where}: no row belongs to this benchmark")
        keys = Counter(problem.key for problem in found)
        key, times = keys.most_common(1)[0]
        if times > 1:
            raise DataError(f"{where}: {times} problems have the key {key!r}")
        return found


def _mathematics(row: Row, *, key: str, problem: str, answer: str, instruction: str) -> Problem:
    """Return a problem in the form of MathArena: its instruction, an empty line, the text of the problem.

    Args:
        key, problem, answer: names of columns.
    """
    text = f"{instruction}\n\n{row[problem]}"
    return Problem(str(row[key]), ({"role": "user", "content": text},), str(row[answer]))


def _arena(name: str, instruction: str) -> Known:
    """Return a competition of MathArena (https://github.com/eth-sri/matharena, configs/competitions)."""
    return Known(
        Source(
            f"MathArena/{name}", "train", {"problem_idx": (int, str), "problem": (str,), "answer": (int, str)}, rows=30
        ),
        partial(_mathematics, key="problem_idx", problem="problem", answer="answer", instruction=instruction),
        MathVerify,
    )


BOXED = "Put your final answer within \\boxed{}."
STEPS = "Please reason step by step, and put your final answer within \\boxed{}."
INTEGER = f"{BOXED}\nThe answer is an integer between 0 and 999 inclusive."

BENCHMARKS: Mapping[str, Known] = {
    # MathArena has no AIME of 2024: the usual data, and the instruction of 2025.
    "aime_2024": Known(
        Source(
            "HuggingFaceH4/aime_2024", "train", {"id": (int, str), "problem": (str,), "answer": (int, str)}, rows=30
        ),
        partial(_mathematics, key="id", problem="problem", answer="answer", instruction=INTEGER),
        MathVerify,
    ),
    "aime_2025": _arena("aime_2025", INTEGER),
    "hmmt_feb_2025": _arena("hmmt_feb_2025", BOXED),
    "hmmt_nov_2025": _arena("hmmt_nov_2025", STEPS),
}


def find(name: str) -> Known:
    """Return a benchmark by its name.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in BENCHMARKS:
        raise ConfigError(f"no sampled benchmark {name!r}{suggest(name, BENCHMARKS)}")
    return BENCHMARKS[name]
