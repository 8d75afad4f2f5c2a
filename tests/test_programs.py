"""Programs that must be right next to those that must not, and what makes an outcome unknown."""

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import FUNCTIONS, HONEST, MISSING, SQUARE, SQUARES, WRONG, WRONG_FUNCTIONS, answer_of

from mmopd.records import Outcome
from mmopd.task import code
from mmopd.task.sandbox import Limits, Run

SLOW = Limits(wall=60.0)  # of this table only CPU time may end a program, on a busy machine, too
verify = code.verifier(SLOW)


@pytest.mark.parametrize("name", HONEST)
def test_a_program_that_solves_the_problem_is_right(name: str) -> None:
    assert verify(answer_of(HONEST[name]), SQUARE) == Outcome(1.0)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_solves_the_problem_is_right(name: str) -> None:
    assert verify(answer_of(FUNCTIONS[name]), SQUARES) == Outcome(1.0)


@pytest.mark.parametrize("name", WRONG)
def test_a_program_that_does_not_is_wrong_and_never_unknown(name: str) -> None:
    assert verify(answer_of(WRONG[name]), SQUARE).value == 0.0


@pytest.mark.parametrize("name", WRONG_FUNCTIONS)
@pytest.mark.parametrize("decimal", [False, True])
def test_a_function_that_does_not_is_wrong_and_never_unknown(name: str, decimal: bool) -> None:
    key = SQUARES.replace("[9, 144]", "[9.5, 144.5]") if decimal else SQUARES
    assert verify(answer_of(WRONG_FUNCTIONS[name]), key).value == 0.0


@pytest.mark.parametrize("name", MISSING)
def test_a_package_that_judges_offer_is_missing_by_its_name(name: str) -> None:
    for program, key in ((MISSING[name], SQUARE), (f"{MISSING[name]}\ndef f(n):\n    return n * n", SQUARES)):
        outcome = verify(answer_of(program), key)
        assert not outcome.known
        assert outcome.cause == f"no_package_{name}"


def test_results_are_compared_by_the_rule_of_the_data_set() -> None:
    program = answer_of("def f(n):\n    return n * 0.1 + 0.2")
    returned = '{"fn_name": "f", "inputs": [[1]], "outputs": [%s]%s}'
    for expected, exact, value in [
        ("0.3", "", 1), ("0.30001", "", 0), ("0.3", ', "exact": true', 0),
        ("0.30000000000000004", ', "exact": true', 1),
    ]:  # fmt: skip
        assert verify(program, returned % (expected, exact)).value == value, (expected, exact)


RESULTS = st.binary(max_size=40) | st.lists(
    st.sampled_from([*'[]{},:"-+.eE0917 ', "NaN", "Infinity", "null", "true", '"a":', "1e999", "\\ud800", "9" * 5000]),
    max_size=12,
).map(lambda parts: "".join(parts).encode())
EXPECTED = st.sampled_from([0.5, 1, 10**400, None, True, "a", [1, 2.5], {"a": [0.5]}, float("nan"), float("inf")])


def run_with(result: bytes) -> Run:
    return Run(b"", "", result, 0, late=False, cpu=0.0, wall=0.0)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(RESULTS, EXPECTED, st.booleans())
def test_any_result_can_be_judged(result: bytes, expected: Any, exact: bool) -> None:
    assert code._returned(run_with(result), expected, exact) in {True, False}
    assert code._returned(run_with(result), code.Wrapped(expected), exact) in {True, False}


@pytest.mark.parametrize("unit", [b"[", b"1,", b"9", b'{"a":', b"[[],", b'"\\ud800",', b"1e9,", b"\xff", b" ", b"-"])
def test_any_result_is_judged_in_bounded_time(unit: bytes) -> None:
    most = (1 << 22) // len(unit)
    for result in (unit * most, b"[" + unit * most + b"0]"):
        begin = time.process_time()
        assert not code._returned(run_with(result[: 1 << 22]), 0.5, exact=False)
        assert time.process_time() - begin < 10


LINES = st.lists(
    st.lists(st.sampled_from(["```", "````", "~~~", "`", "~", "-", "1.", " ", "\t", "python", "x", "{", "\r"])).map(
        "".join
    )
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(LINES)
def test_any_response_has_a_block_or_none(lines: list[str]) -> None:
    found = code.program("\n".join(lines))
    assert found is None or all(part in "\n".join(lines) for part in found.split("\n"))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(LINES, st.text(max_size=50).filter(lambda text: "`" not in text and "~" not in text and "</think>" not in text))
def test_the_last_block_is_found_whatever_comes_before(lines: list[str], body: str) -> None:
    before = "\n".join(line for line in lines if "```" not in line and "~~~" not in line)
    body = "\n".join(line for line in body.split("\n") if line.strip())
    found = code.program(f"{before}\n```python\nx\n{body}\n```\nIt prints\n```text\n9\n```")
    assert found == f"x\n{body}"


@pytest.mark.parametrize("tail", ["`", "x`", "\n", " `x", ""])
@pytest.mark.parametrize("unit", ["~", "`", "- ", "-", "1", "1. ", " ", "\t", "~ ", "```", "~~~\n", "```x\n", "- ~~~ "])
def test_a_block_is_looked_for_in_bounded_time(unit: str, tail: str) -> None:
    response = f"~~~{unit * (200_000 // len(unit))}{tail}"
    begin = time.process_time()
    for text in (response, response.removeprefix("~~~"), f"```python\n{response}\n```"):
        code.program(text)
    assert time.process_time() - begin < 3


def test_a_line_of_tildes_and_a_backtick_hides_nothing() -> None:
    assert verify(f"{'~' * 5000}`\n{answer_of(HONEST['input'])}", SQUARE) == Outcome(1.0)
