"""Judge the hand-judged cases by other projects' verifiers, and write the tables of docs/verifiers.md; takes minutes.

    python benchmarks/verdicts.py

lmms-eval and math-verify are called as their projects call them. The graders of PRIME and of OpenMMReasoner are parts
of trainers (forks of verl) and no packages, so they are left out.
"""

import math
import os
import re
import string
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from verifier_table import OURS, Case, all_cases, errors, single  # noqa: E402

from mmopd.task.response import final_answer, gold_answers  # noqa: E402

DOCUMENT = ROOT / "docs" / "verifiers.md"
Score = Callable[[str, str], float]


def rivals() -> dict[tuple[str, str], Score]:
    """Return, for each (verifier, rival), the rival's score of a response, called as its own project calls it; NaN if
    it raises.
    """
    os.environ.setdefault("OPENAI_API_KEY", "none")
    from lmms_eval.api.metrics import anls, exact_match_hf_evaluate
    from lmms_eval.api.reasoning import strip_reasoning_tags
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks._task_utils.reasoning_utils import compute_score
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness
    from math_verify import StringExtractionConfig, parse
    from math_verify import verify as equal

    def seen(response: str) -> str:
        return str(strip_reasoning_tags(response, [["<think>", "</think>"]])).strip()

    def accuracy(response: str, gold: str) -> float:
        return float(compute_score("", seen(response), gold)["acc_score"])

    def mathematics(response: str, gold: str) -> float:
        return float(equal(parse(f"${gold}$"), parse(seen(response))))

    def letters(response: str, gold: str) -> float:
        options = [StringExtractionConfig(strings=tuple(string.ascii_uppercase[:10]))]
        return float(equal(parse(gold, options), parse(seen(response), options)))

    def option(response: str, gold: str) -> float:
        return float(extract_mcq_answer(seen(response), list(string.ascii_uppercase[:10])) == gold)

    def exact(response: str, gold: str) -> float:
        return float(
            exact_match_hf_evaluate([seen(response)], [gold], ignore_case=True, ignore_punctuation=True)["exact_match"]
        )

    def relaxed(response: str, gold: str) -> float:
        return float(relaxed_correctness(seen(response), gold))

    def similarity(response: str, gold: str) -> float:
        return float(anls([gold], [seen(response)])["anls"])

    def alone(rival: Score) -> Score:
        return lambda response, gold: rival(final_answer(response), gold)

    found: dict[tuple[str, str], Score] = {}
    for name in ("math", "puzzle", "final_number", "number_after_equals"):
        found[name, "math-verify, `verify`"] = mathematics
    for name in ("math", "choice", "exact", "puzzle", "final_number", "number_after_equals"):
        found[name, "lmms-eval, `acc_score`"] = accuracy
    found["choice", "math-verify, letters"] = letters
    found["choice", "lmms-eval, `extract_mcq_answer`"] = option
    found["choice", "the same, given our answer alone"] = alone(option)
    for name, rival, title in (
        ("exact", exact, "exact_match"),
        ("relaxed_number", relaxed, "relaxed_correctness"),
        ("anls", similarity, "anls"),
    ):
        found[name, f"lmms-eval, `{title}`"] = rival
        found[name, "the same, given our answer alone"] = alone(rival)
    return found


def best(score: Score) -> Score:
    """Return the best score over several gold answers, for a rival that takes one; NaN if it raises."""

    def over(response: str, answer: str) -> float:
        try:
            return max(score(response, gold) for gold in gold_answers(answer))
        except Exception:
            return math.nan

    return over


def row(name: str, cases: list[Case], title: str, score: Score) -> str:
    """Return a line of the table."""
    head = f"`{name}` | {len(cases)} | {sum(case.due == 1 for case in cases)}" if title == "ours" else "| |"
    more, less = errors(cases, score)
    return f"| {head} | {title} | {more} | {less} |"


def own(name: str) -> Score:
    """Return the score of our verifier of that name."""
    return lambda response, key: OURS[name](response, key).value


def written(text: str, lines: list[str]) -> str:
    """Return the document with the table that begins with the same line replaced."""
    table = "\n".join(lines)
    return re.sub(rf"{re.escape(lines[0])}\n.*?\n\n", lambda _: f"{table}\n\n", text, count=1, flags=re.DOTALL)


def main() -> None:
    """Write both tables: the single cases with all judges, and all cases with ours."""
    beside = ["| verifier | cases | of them right | judged by | too much | too little |", "|---|---|---|---|---|---|"]
    others = rivals()
    for name, cases in single().items():
        beside.append(row(name, cases, "ours", own(name)))
        beside += [row(name, cases, title, best(rival)) for (of, title), rival in others.items() if of == name]
    ours = ["| verifier | cases | of them right | too much | too little |", "|---|---|---|---|---|"]
    ours += [row(name, cases, "ours", own(name)).replace(" ours |", "") for name, cases in all_cases().items()]
    text = written(written(DOCUMENT.read_text(encoding="utf-8"), beside), ours)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
