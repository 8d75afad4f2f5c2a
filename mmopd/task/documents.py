"""Verifiers of short answers on charts and pages, following the metrics published with the data sets."""

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from mmopd.records import UNKNOWN, Outcome
from mmopd.task.normal import normalised, undressed
from mmopd.task.response import final_answer, gold_answers, marked_answer
from mmopd.task.verify import RIGHT, WRONG

if TYPE_CHECKING:
    from mmopd.task import units

TOLERANCE = Fraction(5, 100)
SPELT = re.compile(r"\b(?:percent|per cent|pct)\.?(?![a-z])", re.IGNORECASE)
SCALES = {"k": 10**3, "thousand": 10**3, "m": 10**6, "mn": 10**6, "mio": 10**6, "mln": 10**6,
          "million": 10**6, "millions": 10**6,
          "b": 10**9, "bn": 10**9, "billion": 10**9, "billions": 10**9, "trillion": 10**12, "tn": 10**12,
          "hundred": 100, "lakh": 10**5, "crore": 10**7}  # fmt: skip
SCALE = re.compile(
    rf"(.*[\d}}])\s*(?i:({'|'.join(name for name in SCALES if len(name) > 1)}|(?-i:[kKMB])))\.?", re.DOTALL
)
MARK = re.compile(r"\s*([,:;])\s*")  # of a list or a ratio
COMMA = re.compile(r"\D*(?:0,\d+|\d+,(?:\d{1,2}|\d{4,}))\D*")  # a decimal comma; in 1,234 it is none
QUOTED = re.compile(r'"([^"]+)"')
YEARS = re.compile(r"\d{4} ?/ ?\d")  # 2019/20 is a year of a business, not a fraction
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
    said = final_answer(response)
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
    said = _folded(final_answer(response))
    if marked_answer(response) is None and not any(gold.endswith(".") for gold in golds):
        said = said.removesuffix(".")  # the full stop of a sentence
    said, *golds = (_unquoted(text) for text in (said, *golds))
    return Outcome(max(_similarity(said, gold) for gold in golds if gold))


def _close(said: str, gold: str) -> bool:
    ours, theirs = normalised(said), normalised(gold)
    if COMMA.fullmatch(ours) and ours.replace(",", ".") == theirs:
        return True
    if MARK.sub(r"\1", ours) == MARK.sub(r"\1", theirs):
        return True
    found, right = _quantity(said), _quantity(gold)
    if found is None or right is None:
        return False
    (value, percent, unit), (target, of_hundred, wanted) = found, right
    if unit is not None and wanted is not None:
        if unit.bases != wanted.bases:
            return False
        value, target = value * unit.factor, target * wanted.factor
    candidates = {value} if percent == of_hundred else {value, value / 100 if percent else value * 100}
    return any(abs(one - target) <= TOLERANCE * abs(target) for one in candidates)


def _quantity(text: str) -> "tuple[Fraction, bool, units.Unit | None] | None":
    """Return a number, True if it is in percent, and its unit; None if the text is not one number."""
    from mmopd.task import dates, expression, tex, units, values  # much to load for a command that only names tasks

    text = tex.ungrouped(tex.prepared(text))
    bare, unit = units.split(SPELT.sub("%", text))
    if unit is not None and unit.bases & units.MONEY_BASES:
        bare = re.sub(r"(?<=\d)\s*m$", "M", bare)  # £45m
    scale = SCALE.fullmatch(bare)
    if scale:
        bare, inner = units.split(scale[1])
        unit = unit or inner
    percent = bare.endswith("%")
    bare = bare.removesuffix("%").strip()
    if dates.NUMERIC.fullmatch(bare) or YEARS.search(bare):
        return None
    try:
        node = expression.read(bare)
        value = None if values.has(node, ("+",)) else values.exact(node)
    except (expression.UnreadableError, RecursionError):
        return None
    if value is None:
        return None
    return value * (SCALES[scale[2].lower()] if scale else 1), percent, unit


def _unquoted(text: str) -> str:
    return found[1] if (found := QUOTED.fullmatch(text)) else text


def _folded(text: str) -> str:
    return undressed(text).lower()


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
