"""No response makes its own outcome unknown: verifiers read any in bounded time, and raise nothing."""

import time

import pytest

from mmopd.task import documents, verify
from mmopd.task.base import Verify

VERIFIERS = {
    verify.math: "3", verify.choice: "B", verify.exact: "abc", verify.puzzle: "1, 2", verify.final_number: "5",
    verify.number_after_equals: "5", documents.relaxed_number: "12", documents.anls: "hello world",
}  # fmt: skip


@pytest.mark.parametrize("said", ["&", "&&", "& &", "and", "or", ",", ";", r"\cup", r"\text{and}", "&,", "and and"])
def test_an_answer_of_signs_that_join_is_wrong(said: str) -> None:
    for verifier in (verify.math, verify.puzzle):
        assert verifier(rf"\boxed{{{said}}}", "3").value == 0.0
        assert verifier(said, "3").value == 0.0


@pytest.mark.parametrize("unit", ["~", "\\", "`", "{", "&", r"\boxed{", "A) ", " ", "answer is "])
@pytest.mark.parametrize("verifier", VERIFIERS, ids=lambda verifier: verifier.__name__)
def test_a_long_response_is_read_in_bounded_time(verifier: Verify, unit: str) -> None:
    begin = time.process_time()
    assert verifier(unit * (30_000 // len(unit)), VERIFIERS[verifier]).value == 0.0
    assert time.process_time() - begin < 2
