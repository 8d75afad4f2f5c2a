"""The hand-judged cases of all verifiers: single ones of verifier_cases.yaml, and families of answers to one key.

`benchmarks/verdicts.py` judges them by other projects' verifiers too, and writes the table of docs/verifiers.md.
"""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mmopd.records import Outcome
from mmopd.task import code, documents, llm, verify

Verify = Callable[[str, str], Outcome]
TESTS = Path(__file__).parent
CLOSE = 0.001
OURS: dict[str, Verify] = {
    "math": verify.math,
    "choice": verify.choice,
    "exact": verify.exact,
    "relaxed_number": documents.relaxed_number,
    "anls": documents.anls,
    "final_number": verify.final_number,
    "number_after_equals": verify.number_after_equals,
    "puzzle": verify.puzzle,
    "code": code.verifier(),
    "judge": llm.verdict,
}


class Case(NamedTuple):
    response: str
    key: str
    due: float | str  # the right score, or "unknown"
    ours: float | str  # what ours is known to say

    @property
    def score(self) -> float:
        """Return the score that is due; 0 for a key that cannot be judged."""
        return 0.0 if isinstance(self.due, str) else float(self.due)


@cache
def single() -> dict[str, list[Case]]:
    found = yaml.safe_load((TESTS / "verifier_cases.yaml").read_text(encoding="utf-8"))
    return {name: [Case(*case[:3], case[-1]) for case in cases] for name, cases in found.items()}


@cache
def families() -> dict[str, list[list[Case]]]:
    found: dict[str, list[list[Case]]] = {}
    for path in sorted((TESTS / "verifier_families").glob("*.yaml")):
        for name, members in yaml.safe_load(path.read_text(encoding="utf-8")).items():
            found.setdefault(name, []).extend(list(_cases(name, family)) for family in members)
    return found


def _cases(name: str, family: dict[str, Any]) -> Iterator[Case]:
    refused, rewarded = family.get("refused", []), family.get("rewarded", [])
    wrong = "unknown" if family.get("unknown") else 0.0
    for form in family.get("right", []):
        yield Case(_response(family, form), family["key"], 1.0, wrong if form in refused else 1.0)
    for form in family.get("wrong", []):
        yield Case(_response(family, form), family["key"], wrong, 1.0 if form in rewarded else wrong)


def _response(family: dict[str, Any], form: str) -> str:
    return form if family.get("whole") else f"\\boxed{{{form}}}"


@cache
def all_cases() -> dict[str, list[Case]]:
    """Return the cases of each verifier; one that is noted twice counts once."""
    cases = {name: list(part) for name, part in single().items()}
    for name, members in families().items():
        cases.setdefault(name, []).extend(case for family in members for case in family)
    return {name: list({case[:2]: case for case in part}.values()) for name, part in cases.items()}


def errors(cases: list[Case], score: Callable[[str, str], float]) -> tuple[int, int]:
    """Count scores above and below what is due."""
    more = less = 0
    for case in cases:
        said = score(case.response, case.key)
        more += said > case.score + CLOSE
        less += case.score > 0 and not said >= case.score - CLOSE
    return more, less
