"""Compares what a program printed or returned with what a test expects; whatever it says, this ends soon and well.

Printed decimal fractions may differ as in PRIME (numpy's `allclose`): by 1e-5 of the expected one, plus 1e-8. Those
that a function returns must be equal, as in PRIME, but for their rounding. Where the key asks for exactness, decimals
must be equal, as in LiveCodeBench. Integers are always exact.
"""

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

PRINTED = 1e-5, 1e-8  # of the expected number, and in all
RETURNED = 1e-9, 1e-12  # the same: what the order of operations changes in a float
LONGEST = 400  # characters of a word that may be a number; longer ones are compared as text
DIGITS = 4300  # digits of an integer that Python converts without complaint
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?", re.ASCII)
WHOLE = re.compile(r"[+-]?\d+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Digits:
    """An integer that is too long to be converted; it is only compared."""

    text: str

    def __str__(self) -> str:
        return self.text


def read_json(text: str | bytes) -> Any:
    """Return a JSON value, in which long integers are `Digits`.

    Raises:
        ValueError: not JSON.
        RecursionError: nested too deeply.
    """
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= DIGITS else Digits(digits))


def same_output(said: str, expected: str, *, exact: bool = False) -> bool:
    """Compare two outputs line by line and word by word; empty lines and blanks do not count."""
    if said == expected:
        return True
    ours, theirs = ([line.split() for line in text.splitlines() if line.strip()] for text in (said, expected))
    return len(ours) == len(theirs) and all(
        len(a) == len(b) and all(_same_word(x, y, exact) for x, y in zip(a, b, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )


def same_value(said: Any, expected: Any, *, exact: bool = False) -> bool:
    """Compare two JSON values; true is not 1, and NaN is NaN."""
    try:
        return _same_value(said, expected, exact)
    except RecursionError:
        return False


def _same_value(said: Any, expected: Any, exact: bool) -> bool:
    if isinstance(said, bool) or isinstance(expected, bool):
        return said is expected
    if isinstance(said, float) or isinstance(expected, float):
        numbers = isinstance(said, int | float) and isinstance(expected, int | float)
        return numbers and (
            said == expected if exact or isinstance(expected, int) else _near(said, expected, *RETURNED)
        )
    if isinstance(said, list) and isinstance(expected, list):
        return len(said) == len(expected) and all(_same_value(a, b, exact) for a, b in zip(said, expected, strict=True))
    if isinstance(said, dict) and isinstance(expected, dict):
        return said.keys() == expected.keys() and all(_same_value(said[key], expected[key], exact) for key in said)
    return type(said) is type(expected) and bool(said == expected)


def _same_word(said: str, expected: str, exact: bool) -> bool:
    if said == expected:
        return True
    if max(len(said), len(expected)) > LONGEST or not (NUMBER.fullmatch(said) and NUMBER.fullmatch(expected)):
        return False
    if exact:
        return Decimal(said) == Decimal(expected)
    return WHOLE.fullmatch(expected) is None and _near(float(said), float(expected), *PRINTED)


def _near(said: float, expected: float, relative: float, absolute: float) -> bool:
    """Return True for two numbers that are the same but for rounding, or both not a number."""
    try:
        a, b = float(said), float(expected)
    except OverflowError:  # an integer beyond all floats
        return False
    if not (math.isfinite(a) and math.isfinite(b)):
        return a == b or (math.isnan(a) and math.isnan(b))
    return abs(a - b) <= absolute + relative * abs(b)
