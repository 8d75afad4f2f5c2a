"""Judge the hand-judged cases by other projects' verifiers, and write the table of docs/verifiers.md; takes minutes.

    python benchmarks/verdicts.py --prime PRIME --openmmreasoner OpenMMReasoner

lmms-eval and math-verify are called as their projects call them. The graders of PRIME and of OpenMMReasoner are parts
of trainers and no packages. They are imported from checkouts of github.com/PRIME-RL/PRIME and
github.com/EvolvingLMMs-Lab/OpenMMReasoner; without one, its lines are left out. PRIME's needs pylatexenc, and a version
of antlr4 that sympy can use:

    pip install --no-deps --target FOLDER pylatexenc antlr4-python3-runtime==4.11.1    # then with PYTHONPATH=FOLDER
"""

import argparse
import importlib.util
import math
import os
import re
import signal
import string
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from verifier_table import OURS, Case, all_cases, errors  # noqa: E402

from mmopd.task.response import final_answer, gold_answers  # noqa: E402

SECONDS = 60  # for an answer, after which a rival has none
DOCUMENT = ROOT / "docs" / "verifiers.md"
MATHEMATICS = ("math", "puzzle", "final_number", "number_after_equals")  # verifiers that mathematical graders match
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
    for name in MATHEMATICS:
        found[name, "math-verify, `verify`"] = mathematics
    for name in (*MATHEMATICS, "choice", "exact"):
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


def load(name: str, path: Path) -> ModuleType:
    """Import a package or a module of a checkout, without the packages above it."""
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def prime(checkout: Path) -> dict[tuple[str, str], Score]:
    """Return PRIME's score of mathematics; its trainer rewards the first of what the grader returns."""
    folder = checkout / "training/verl/utils/reward_score/evaluation_utils/math_util"
    grader = load("prime_math", folder / "__init__.py")

    def score(response: str, gold: str) -> float:
        return float(grader.evaluate_math(response, gold)[0])

    return dict.fromkeys(((name, "PRIME, `evaluate_math`") for name in MATHEMATICS), score)


def openmmreasoner(checkout: Path) -> dict[tuple[str, str], Score]:
    """Return the accuracy of OpenMMReasoner's rules; its judge is off, as it is by default."""
    rules = load("openmmreasoner", checkout / "custom_rewards/lmms_lab_recipe.py")

    def score(response: str, gold: str) -> float:
        return float(rules.compute_score("", response, gold)["acc_score"])

    return dict.fromkeys(((name, "OpenMMReasoner, `acc_score`") for name in (*MATHEMATICS, "choice", "exact")), score)


def too_late(*_: object) -> NoReturn:
    """End a rival's judgement."""
    raise TimeoutError


def best(score: Score) -> Score:
    """Return the best score over several gold answers, for a rival that takes one; NaN if it raises or takes long."""

    def over(response: str, answer: str) -> float:
        signal.signal(signal.SIGALRM, too_late)
        signal.alarm(SECONDS)
        try:
            return max(score(response, gold) for gold in gold_answers(answer))
        except Exception:
            return math.nan
        finally:
            signal.alarm(0)

    return over


def row(name: str, cases: list[Case], title: str, score: Score) -> str:
    """Return a line of the table."""
    head = f"`{name}` | {len(cases)} | {sum(case.due == 1 for case in cases)}" if title == "ours" else "| |"
    more, less = errors(cases, score)
    return f"| {head} | {title} | {more} | {less} |"


def own(name: str) -> Score:
    """Return the score of our verifier of that name."""
    return lambda response, key: OURS[name](response, key).value


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prime", type=Path, help="a checkout of PRIME")
    parser.add_argument("--openmmreasoner", type=Path, help="a checkout of OpenMMReasoner")
    given = parser.parse_args()
    others = rivals()
    others |= prime(given.prime) if given.prime else {}
    others |= openmmreasoner(given.openmmreasoner) if given.openmmreasoner else {}
    lines = ["| verifier | cases | of them right | judged by | too much | too little |", "|---|---|---|---|---|---|"]
    for name, cases in all_cases().items():
        lines.append(row(name, cases, "ours", own(name)))
        lines += [row(name, cases, title, best(rival)) for (of, title), rival in others.items() if of == name]
        print("\n".join(lines[-8:]), flush=True)
    table = "\n".join(lines)
    text = DOCUMENT.read_text(encoding="utf-8")
    text = re.sub(rf"{re.escape(lines[0])}\n.*?\n\n", lambda _: f"{table}\n\n", text, count=1, flags=re.DOTALL)
    DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
