"""Finds the option that a response chooses; a response that lists options chooses none."""

import re

from mmopd.task.normal import undressed
from mmopd.task.response import LONGEST, final_answer, marked_answer, without_thoughts

LETTER = r"(?:\((?P<round>[A-Z])\)|\[(?P<square>[A-Z])\]|(?P<bare>[A-Z])(?![\w'-]))"
SAID = re.compile(
    r"(?:(?:so|thus|therefore|hence|then)\b,?\s*)?"
    r"(?:(?:(?:i )?(?:choose|select|pick)\b|it(?:'s| is| must be| has to be)\b|(?:因此|所以|故|应)?选择?)[,:]?\s*)?"
    r"(?:(?:the\s+)?(?:correct\s+|right\s+|best\s+)?(?:option|choice|answer)\s*(?:is|:)?\s*)?"
    rf"(?:选项)?{LETTER}"
    r"(?P<rest>(?:(?<=[)\]])\s|\s*\.(?![A-Z](?!\w))|\s*[:)\],;!-]|\s*(?:is|was)\s+(?:the\s+)?(?:correct|right|true|best|answer|only)\b|"
    r"\s+(?:because|since|as|for|given|due)\b|\s+\(|\s+(?=\W|\d)|\s*$).*)?",
    re.DOTALL | re.IGNORECASE,
)
SEVERAL = re.compile(
    r"\s*[.:)\]]?\s*(?:(?:or|and|und|oder|et|ou|и|или)\b|[,;/|&+和或]|\(?[A-Z](?:[.:)\s]|$))\s*\(?[A-Za-z](?![A-Za-z])|\s*(?:or|and)\b"
)
NOT_THESE = re.compile(r",?\s*\b(?:and\s+)?(?:not|rather than|instead of|but not)\s+\(?[A-Z]\)?(?![\w])")
BRACED = re.compile(r"\{ ?([^{}]*?) ?\}")
QUOTED = re.compile(r"""(["'])(\(?[A-Za-z]\)?)\1""")
OTHER = re.compile(r"(?:,|\bno\b|\bbut\b|\bactually\b)\W*([A-Z])\W*$")
MARK = re.compile(r"(?:^|(?<=[\s,;]))(?:\(([A-Z])\)|([A-Z])[.:)])(?=\s|$)")
STRAIGHT = re.compile(
    r"(?:is|are)\s+(?:not\b|wrong|incorrect|false)|\b(?:cannot|can't|isn't|wrong|incorrect)\b", re.IGNORECASE
)


def named(response: str) -> str | None:
    """Return the letter that the final answer names; None if it names none, or more than one."""
    marked = marked_answer(response) is not None
    said = QUOTED.sub(r"\2", BRACED.sub(r"\1", undressed(final_answer(response)).strip("* ")))
    if not marked and (_lists(response) or len(MARK.findall(f"{said} ")) > 1):
        return None
    found = SAID.fullmatch(NOT_THESE.sub("", said))
    if not found:
        return None
    letter = found["round"] or found["square"] or found["bare"]
    rest = found["rest"] or ""
    if SEVERAL.match(rest) or (STRAIGHT.match(rest.strip()) is not None):
        return None
    if (other := OTHER.search(rest)) and other[1] != letter.upper():
        return None
    if found["bare"] and letter.islower() and rest.strip(" .)。"):
        return None  # "a ..." is an article
    if marked and any(letter.upper() not in pair for pair in MARK.findall(f"{rest} ")):
        return None
    return str(letter).upper()


def _lists(response: str) -> bool:
    """Return True if the last line is one of a list of options: the line before it begins with another letter."""
    lines = [line.strip() for line in without_thoughts(response).splitlines() if line.strip()][-2:]
    marks = [re.match(r"[-*\s]*(?:\(([A-Z])\)|([A-Z])[.:)])(?=\s|$)", undressed(line[:LONGEST])) for line in lines]
    if len(lines) < 2 or not all(marks):
        return False
    before, last = ((mark[1] or mark[2]) if mark else "" for mark in marks)
    return before != last
