"""Verifiers: (response text, answer key) -> `Outcome`.

1 is right and 0 is wrong; an answer that cannot be found in the response is wrong. Unknown (NaN) is only for what the
student did not cause: an answer key that does not fit the verifier. An exception is unknown too; the pool handles it,
and limits the time and the memory of a verifier. A key with several right answers is a JSON list of texts
(`gold_answers`); `exact`, `math`, `relaxed_number` and `anls` accept one.
"""

import re
from collections.abc import Callable
from decimal import Decimal

from mmopd.records import UNKNOWN, Outcome
from mmopd.task import options
from mmopd.task.normal import normalised, signs, undressed
from mmopd.task.response import LONGEST, final_answer, gold_answers, marked_answer, without_thoughts

RIGHT = Outcome(1.0)
WRONG = Outcome(0.0)
NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
WORDS = re.compile(
    r"(?i:yes|no|true|false|odd|even|none)|[A-Z]{3,}|(?=.*[A-Za-z]{4})[A-Za-z]+(?:[ '-][A-Za-z]+)*"  # DNE, SAS
)
TEXT = re.compile(r"\s*\\(?:text|textbf|textrm|mbox)\s*\{\s*[A-Za-z]{2,}\s*\}\s*")  # no product of letters
ARTICLE = re.compile(r"(?:the|an?) (?=\w{3})")
NO_SOLUTION = re.compile(r"(?i:(?:the )?empty set|(?:there (?:is|are) )?no (?:real )?solutions?)\.?")
PROSE = re.compile(r"[^\W\d_][^\d\\^_=<>+*/{}|$]*")  # a key in words, which no other words equal
STATES = re.compile(
    r"\b(?:is|are|be|equals|gives|get|gets|obtain|have|has|therefore|thus|hence|so)\b\s*:?|:\s", re.IGNORECASE
)


def number_after_equals(response: str, answer: str) -> Outcome:
    """Judge the number after the last `=`; only blanks may follow it."""
    found = re.fullmatch(rf"\s*({NUMBER})\s*", signs(response.rpartition("=")[2])) if "=" in response else None
    return _same_number(found[1] if found else None, answer)


def final_number(response: str, answer: str) -> Outcome:
    """Judge the last number of the response (GSM8K's rule)."""
    found = re.findall(rf"(?<![\w.]){NUMBER}(?!\w)", signs(without_thoughts(response)))
    return _same_number(found[-1] if found else None, answer)


def exact(response: str, answer: str) -> Outcome:
    """Compare the final answer with the key, up to case, LaTeX, blanks and marks at the ends (`normalised`)."""
    golds = {normalised(gold) for gold in gold_answers(answer)}
    if not any(golds):
        return Outcome(UNKNOWN, f"the answer key {answer!r} is empty")
    return RIGHT if normalised(final_answer(response)) in golds - {""} else WRONG


def choice(response: str, answer: str) -> Outcome:
    """Judge whether the final answer names the option of the key, and no other.

    Both sides are strict: the key is one letter, and the final answer is that letter alone, in brackets, or followed by
    a mark or a reason: `B`, `(B)`, `B. 12`, `B: because`. "Blue" names no option, and a list of options names none.
    """
    if (key := option_key(answer)) is None:
        return Outcome(UNKNOWN, f"the answer key {answer!r} is not the letter of an option")
    return RIGHT if options.named(response) == key else WRONG


def option_key(answer: str) -> str | None:
    """Return the letter of a key such as `B`, `(b)` or `\\text{B}.`; None if it is not one."""
    key = undressed(answer).strip("() .").upper()
    return key if re.fullmatch("[A-Z]", key) else None


def math(response: str, answer: str) -> Outcome:
    """Compare the final answer with the key as mathematics (`mmopd.task.mathematics`), both of them as a whole.

    A key in words is compared as words. Another key that is not understood as a whole accepts the same text; the
    outcome of other answers is unknown.
    """
    return _any(answer, lambda gold: _math(response, gold, ordered=False))


def puzzle(response: str, answer: str) -> Outcome:
    """Judge by the form of the key: `choice` for the letter of an option, `exact` for words, otherwise as `math` does,
    but with the order of lists.
    """
    if re.fullmatch(r"\s*\(?[A-Z]\)?\.?\s*", answer):
        return choice(response, answer)
    if re.fullmatch(r"[^\W\d_]{2,}", undressed(answer)):  # letters in their order, not a product
        return _words(response, answer)
    return _any(answer, lambda gold: _math(response, gold, ordered=True))


def _any(answer: str, judge: Callable[[str], Outcome]) -> Outcome:
    """Return the best outcome over the right answers of a key."""
    return max(map(judge, gold_answers(answer)), key=lambda outcome: outcome.value if outcome.known else -1.0)


def _same_number(found: str | None, answer: str) -> Outcome:
    if not re.fullmatch(NUMBER, answer.strip()):
        return Outcome(UNKNOWN, f"the answer key {answer!r} is not a number")
    same = found is not None and Decimal(found.replace(",", "")) == Decimal(answer.strip().replace(",", ""))
    return RIGHT if same else WRONG


def _math(response: str, answer: str, *, ordered: bool) -> Outcome:
    if not answer.strip() or len(answer) > LONGEST:
        return Outcome(UNKNOWN, f"the answer key {answer[:100]!r} is empty or too long")
    found = marked_answer(response)
    if found is not None and len(found) > LONGEST:
        return WRONG
    if NO_SOLUTION.fullmatch(undressed(answer)):
        answer = r"\emptyset"
    if WORDS.fullmatch(undressed(answer)) or TEXT.fullmatch(answer):  # "on" is not "no", and "NED" not "DNE"
        return _words(response, answer)
    from mmopd.task import mathematics  # much to load for a command that only names tasks

    verdicts = [mathematics.same(said, answer, ordered=ordered) for said in _stated(response)]
    if any(verdicts):
        return RIGHT
    if mathematics.same("?", answer) is None and not PROSE.fullmatch(undressed(answer)):
        return Outcome(
            UNKNOWN, f"the answer key {answer!r} is not understood as a whole, and it is not the answer's text"
        )
    return WRONG


def _words(response: str, answer: str) -> Outcome:
    """Compare words as `exact` does, but for an article before them, and for blanks between capitals: `U D L R`."""
    said, gold = (ARTICLE.sub("", normalised(text), count=1) for text in (final_answer(response), answer))
    if re.fullmatch(r"[A-Z]{2,}", undressed(answer)) and re.fullmatch(r"[a-z](?:,? [a-z])+", said):
        said = re.sub("[, ]", "", said)
    return RIGHT if said == gold else exact(response, answer)


def _stated(response: str) -> list[str]:
    """Return the readings of an answer: the marked one; without a mark the last line, and its end after "is"."""
    said = final_answer(response)
    if marked_answer(response) is not None:
        return [said]
    tail = STATES.split(said)[-1].strip(" ,")
    return list(dict.fromkeys(one for one in (said, tail) if one))
