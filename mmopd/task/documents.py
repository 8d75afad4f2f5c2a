"""Verifiers of short answers on charts and pages, following the metrics published with the data sets."""

import re
from decimal import Decimal

from mmopd.records import UNKNOWN, Outcome
from mmopd.task.verify import NUMBER, RIGHT, WRONG, final_answer, gold_answers, marked_answer, normalised, plain

TOLERANCE = Decimal("0.05")
SHORTEST = 0.5  # ANLS below which an answer counts for nothing
LONGEST = 2000  # characters of a gold answer


def relaxed_number(response: str, answer: str) -> Outcome:
    """Judge by ChartQA's relaxed accuracy (arXiv 2203.10244, section 5.1).

    Numbers must be within 5 % of the key; texts must equal it after normalisation. As published, years are numbers too:
    1990 passes for 2010. Thousands separators, a currency sign and a percent sign are optional; where only one side has
    a percent sign, 25 % is 25 or 0.25. A key of 0 accepts only 0.
    """
    golds = [gold for gold in gold_answers(answer) if normalised(gold)]
    if not golds:
        return Outcome(UNKNOWN, f"the answer key {answer!r} is empty")
    said = plain(final_answer(response))
    return RIGHT if any(_close(said, gold) for gold in golds) else WRONG


def anls(response: str, answer: str) -> Outcome:
    """Judge by DocVQA's average normalised Levenshtein similarity (arXiv 1907.00490, Eq. 1); the best gold answer
    counts.

    The score is soft: 1 minus the edit distance over the longer length, of texts in lower case with single blanks; 0
    where half or more differs.
    """
    golds = [_folded(gold) for gold in gold_answers(answer)]
    if not any(golds) or max(map(len, golds)) > LONGEST:
        return Outcome(UNKNOWN, f"the answer key {answer[:100]!r} is empty or too long")
    said = _folded(plain(final_answer(response)))
    if marked_answer(response) is None and not any(gold.endswith(".") for gold in golds):
        said = said.removesuffix(".")  # the full stop of a sentence
    return Outcome(max(_similarity(said, gold) for gold in golds if gold))


def _close(said: str, gold: str) -> bool:
    right = _values(gold)
    if not right:
        return normalised(said) == normalised(gold)
    if not (found := _values(said)):
        return False
    (value, percent), (target, of_hundred) = found, right
    candidates = {value} if percent == of_hundred else {value, value / 100 if percent else value * 100}
    return any(abs(one - target) <= TOLERANCE * abs(target) for one in candidates)


def _values(text: str) -> tuple[Decimal, bool] | tuple[()]:
    """Return a number and True if it is in percent; an empty tuple if the text is not a number."""
    bare = normalised(text).replace("−", "-").replace("\\%", "%").replace("\\", "").replace("{,}", ",")
    found = re.fullmatch(rf"(-?)\s*(?:[$€£¥]|usd)?\s*({NUMBER}|\.\d+)\s*(%|percent|per cent)?", bare)
    if not found:
        return ()
    value = Decimal(found[2].replace(",", ""))
    return (-value if found[1] else value), found[3] is not None


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(said: str, gold: str) -> float:
    longer = max(len(said), len(gold))
    if abs(len(said) - len(gold)) >= SHORTEST * longer:
        return 0.0
    distances = list(range(len(gold) + 1))
    for i, one in enumerate(said, start=1):
        corner, distances[0] = distances[0], i
        for j, other in enumerate(gold, start=1):
            corner, distances[j] = distances[j], min(distances[j] + 1, distances[j - 1] + 1, corner + (one != other))
    share = distances[-1] / longer
    return 1 - share if share < SHORTEST else 0.0
