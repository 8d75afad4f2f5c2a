"""Verifiers: (response text, answer key) -> `Outcome`.

1 is right and 0 is wrong; an answer that cannot be found in the response is wrong. Unknown (NaN) is only for what the
student did not cause: an answer key that does not fit the verifier. An exception is unknown too; the pool handles it,
and limits the time and the memory of a verifier. A key with several right answers is a JSON list of texts
(`gold_answers`); `exact`, `math`, `relaxed_number` and `anls` accept one.
"""

import json
import logging
import re
import unicodedata
from decimal import Decimal

from mmopd.records import UNKNOWN, Outcome

RIGHT = Outcome(1.0)
WRONG = Outcome(0.0)
NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
LONGEST = 2000  # characters of an answer; the rest is ignored
WORDS = re.compile(r"(?i:yes|no|true|false|odd|even|none)|(?=.*[A-Za-z]{4})[A-Za-z]+(?:[ '-][A-Za-z]+)*")
ENDS = re.compile(r"""^(?:[ ,;:!?"'`*$()\[\]]|\.(?!\d))+|[ .,;:!?"'`*$()\[\]]+$""")
CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:option|choice|answer)\s+)?"  # option B
    r"(?:\((?P<round>[A-Z])\)|(?P<bare>[A-Z])(?=[.:)]|\s*$))"  # (B)   B.   B)   B: because   B
    r"[.:)]?(?!\s*(?:(?:or|and)\b|[,/&]|\(?[A-Z][.:)]))(?:\s.*)?",  # and not: (B) or (C)
    re.DOTALL | re.IGNORECASE,
)


def number_after_equals(response: str, answer: str) -> Outcome:
    """Judge the number after the last `=`; only blanks may follow it."""
    found = re.fullmatch(rf"\s*({NUMBER})\s*", response.rpartition("=")[2]) if "=" in response else None
    return _same_number(found[1] if found else None, answer)


def final_number(response: str, answer: str) -> Outcome:
    """Judge the last number of the response (GSM8K's rule)."""
    found = re.findall(rf"(?<![\w.]){NUMBER}(?!\w)", without_thoughts(response))
    return _same_number(found[-1] if found else None, answer)


def exact(response: str, answer: str) -> Outcome:
    r"""Compare the final answer with the key, up to case, width, blanks, `\text{}` and punctuation around it."""
    golds = {normalised(plain(gold)) for gold in gold_answers(answer)}
    if not any(golds):
        return Outcome(UNKNOWN, f"the answer key {answer!r} is empty")
    return RIGHT if normalised(plain(final_answer(response))) in golds - {""} else WRONG


def choice(response: str, answer: str) -> Outcome:
    """Judge whether the final answer names the option of the key, and no other.

    Both sides are strict: the key is one letter, and the final answer is that letter alone, in brackets, or followed by
    a mark: `B`, `(B)`, `B.`, `B: because`. "Blue" names no option.
    """
    key = answer.strip().strip("().").upper()
    if not re.fullmatch("[A-Z]", key):
        return Outcome(UNKNOWN, f"the answer key {answer!r} is not the letter of an option")
    said = unicodedata.normalize("NFKC", final_answer(response))
    found = CHOICE.fullmatch(re.sub(r"\\text(?:bf)?\{(.*)\}|[*$`]+", r"\1", said).strip())
    return RIGHT if found and (found["round"] or found["bare"]).upper() == key else WRONG


def math(response: str, answer: str) -> Outcome:
    """Compare the final answer with the key as mathematics (math-verify); a key in words is compared as words.

    math-verify's own time limits are signals, which do not work in threads and whose failure it reports as "wrong".
    They are off, and errors are raised; the pool limits the time. A response that it cannot read is wrong.
    """
    outcomes = [_math(response, gold) for gold in gold_answers(answer)]
    return max(outcomes, key=lambda outcome: outcome.value if outcome.known else -1.0)


def puzzle(response: str, answer: str) -> Outcome:
    """Judge by the form of the key: `choice` for the letter of an option, `exact` for words, otherwise `math`."""
    if re.fullmatch(r"\s*\(?[A-Z]\)?\.?\s*", answer):
        return choice(response, answer)
    return math(response, answer) if re.search(r"\d|\\[a-z]", answer) else exact(response, answer)


def without_thoughts(response: str) -> str:
    """Return the response after its `</think>`; empty if the thought never ends."""
    head, end, tail = response.rpartition("</think>")
    return tail if end else head + ("" if "<think>" in response else tail)


def marked_answer(response: str) -> str | None:
    r"""Return the answer that is marked: the last `<answer>`, or else the last `\boxed`; None if there is neither."""
    text = without_thoughts(response)
    ends = [mark.start() for mark in re.finditer("</answer>", text, re.IGNORECASE)][-1:]
    starts = [mark.end() for mark in re.finditer("<answer>", text, re.IGNORECASE) if ends and mark.end() <= ends[0]]
    if starts:
        last = text[starts[-1] : ends[0]].strip()
        inner = _boxed(last)
        return inner if inner is not None else last
    return _boxed(text)


def final_answer(response: str) -> str:
    """Return the marked answer.

    Without a mark, return what follows "answer is", "option:" or the like in the last line, or that whole line.
    """
    marked = marked_answer(response)
    if marked is not None:
        return marked[:LONGEST]
    lines = [line.strip() for line in without_thoughts(response).splitlines() if line.strip()]
    if not lines:
        return ""
    said = re.split(r"\b(?:answer|option|choice)\s*(?:is|:)\s*:?\s*", lines[-1], flags=re.IGNORECASE)
    return said[-1].strip()[:LONGEST]


def gold_answers(key: str) -> list[str]:
    """Return the right answers of a key: one, or several if the key is a JSON list of texts."""
    if key.lstrip().startswith("["):
        try:
            golds = json.loads(key)
        except ValueError:  # for example an interval
            return [key]
        if isinstance(golds, list) and golds and all(isinstance(gold, str) for gold in golds):
            return golds
    return [key]


def plain(text: str) -> str:
    r"""Remove what only changes the look: `\text{}` and the like, emphasis, dollars around the text."""
    bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf|textit)\s*\{([^{}]*)\}", r"\1", text)
    bare = bare.replace("**", "").strip()
    return bare.strip("$").strip() if bare.startswith("$") and bare.endswith("$") else bare


def normalised(text: str) -> str:
    """Return the text in lower case, with one width (NFKC), single blanks, and no punctuation at its ends."""
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return ENDS.sub("", folded)


def _same_number(found: str | None, answer: str) -> Outcome:
    if not re.fullmatch(NUMBER, answer.strip()):
        return Outcome(UNKNOWN, f"the answer key {answer!r} is not a number")
    same = found is not None and Decimal(found.replace(",", "")) == Decimal(answer.strip().replace(",", ""))
    return RIGHT if same else WRONG


def _boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`; braces may nest."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : end].strip()
    return None


def _math(response: str, answer: str) -> Outcome:
    from math_verify import parse, verify  # takes a second to import, and tasks without mathematics do not need it

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    if WORDS.fullmatch(plain(answer)):  # math-verify would read words as products of letters, and "on" as "no"
        return exact(response, answer)
    gold = parse(_latex(answer), parsing_timeout=None, raise_on_error=True)
    if not gold:
        return Outcome(UNKNOWN, f"the answer key {answer!r} is not a mathematical expression")
    found = marked_answer(response)
    if found is not None and len(found) > LONGEST:
        return WRONG
    said = _latex(found) if found is not None else _digits(without_thoughts(response)[-LONGEST:])
    try:
        predicted = parse(said, parsing_timeout=None, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:
        return WRONG
    return RIGHT if predicted and verify(gold, predicted, timeout_seconds=None, raise_on_error=True) else WRONG


def _latex(expression: str) -> str:
    """Return the expression between dollars; without them math-verify reads only a part of LaTeX."""
    expression = _digits(expression).replace(r"\$", "")
    return expression if re.search(r"\$|\\\(|\\\[|\\boxed", expression) else f"${expression}$"


def _digits(text: str) -> str:
    """Replace digits of other scripts by ASCII digits."""
    return "".join(str(unicodedata.decimal(sign)) if sign.isdecimal() else sign for sign in text)
