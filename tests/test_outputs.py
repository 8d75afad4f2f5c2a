"""The comparison of outputs: nothing that a program says raises, and nothing takes long."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmopd.task import outputs

WORDS = st.text(alphabet="0123456789+-.eExinfa \n\t_", max_size=60)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.integers(10**300, 10**500),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(WORDS, WORDS, st.booleans())
def test_any_two_outputs_can_be_compared_and_each_equals_itself(said: str, expected: str, exact: bool) -> None:
    assert outputs.same_output(said, expected, exact=exact) in {True, False}
    assert outputs.same_output(said, said, exact=exact)
    assert outputs.same_output(f"{said}\n x", f" {said}\nx\n", exact=exact)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(VALUES, VALUES, st.booleans())
def test_any_two_values_can_be_compared_and_each_equals_itself(said: Any, expected: Any, exact: bool) -> None:
    assert outputs.same_value(said, expected, exact=exact) in {True, False}
    copy = outputs.read_json(json.dumps(said))
    assert outputs.same_value(copy, outputs.read_json(json.dumps(said)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(-1e300, 1e300), st.floats(0, 1), st.booleans())
def test_rounded_fractions_pass_and_others_do_not(value: float, share: float, printed: bool) -> None:
    relative, absolute = outputs.PRINTED if printed else outputs.RETURNED
    slack = absolute + relative * abs(value)

    def same(said: float, *, exact: bool = False) -> bool:
        if printed:
            return outputs.same_output(repr(said), repr(value), exact=exact)
        return outputs.same_value(said, value, exact=exact)

    assert same(value + 0.9 * slack * share)
    assert not same(value + 1.5 * slack) or value + 1.5 * slack - value <= slack
    assert same(value, exact=True)


LONG = [
    ("1" * 20000 + "x", "0.5"), ("1" * 4_000_000, "0.5"), ("1" * 4_000_000, "1" * 3_999_999 + "."), ("9e9999", "0.5"),
    ("1e-9999", "1e9999"), ("." * 100_000, "0.1"), ("1." * 100_000, "0.1"), ("1 " * 500_000, "1 " * 499_999 + "0.5"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(LONG)))
@pytest.mark.parametrize("exact", [False, True])
def test_long_outputs_are_compared_soon(number: int, exact: bool) -> None:
    said, expected = LONG[number]
    begin = time.monotonic()
    assert not outputs.same_output(said, expected, exact=exact)
    assert time.monotonic() - begin < 5


def test_long_integers_are_compared_and_deep_values_do_not_raise() -> None:
    long = outputs.read_json("1" + "0" * 100_000)
    assert outputs.same_value(long, outputs.read_json("1" + "0" * 100_000))
    assert not outputs.same_value(long, outputs.read_json("1" + "0" * 99_999 + "1"))
    assert not outputs.same_value(long, 0.5)
    assert not outputs.same_value(10**400, 0.5)
    assert not outputs.same_value(100000.9, 100000)
    assert not outputs.same_value(0, 0.0000009)
    assert outputs.same_value(3.0, 3)
    assert outputs.same_value(1e-17, 0.0)
    assert not outputs.same_value(1234568.50, 1234567.89)
    deep: list[Any] = []
    other: list[Any] = []
    for _ in range(100_000):
        deep, other = [deep], [other]
    assert not outputs.same_value(deep, other)


@pytest.mark.parametrize(
    ("said", "expected", "as_in_prime", "exactly"),
    [("1234568.50", "1234567.89", True, False), ("0", "0.0000009", False, False), ("0.50", "0.5", True, True),
     ("0.3333333", "0.33333333", True, False), ("1000001", "1000000", False, False), ("1e3", "1000.0", True, True),
     ("nan", "0.5", False, False), ("\uff10.5", "0.5", False, False), ("3.0", "3", False, True),
     ("yes", "YES", False, False)],
)  # fmt: skip
def test_decimal_fractions_follow_the_rule_of_the_data_set(
    said: str, expected: str, as_in_prime: bool, exactly: bool
) -> None:
    assert outputs.same_output(said, expected) == as_in_prime
    assert outputs.same_output(said, expected, exact=True) == exactly
