"""Keys that `mmopd prepare` leaves out, by cause, and those that it accepts or writes in another way."""

import math

import pytest

from mmopd.prompts import convert
from mmopd.prompts.rows import RowError
from mmopd.task.keys import fault
from mmopd.task.load import load_tasks


@pytest.mark.parametrize(
    ("task", "key", "cause"),
    [
        ("image_choice", "B. 12", "key judges nothing"),
        ("image_choice", "Blue", "key judges nothing"),
        ("image_choice", "(B)", None),
        ("text_math", "nan", "key is missing"),
        ("text_math", "1e-07", None),
        ("text_math", "x^2+1", None),
        ("text_math", r"\int_0^1 x\,dx", None),
        ("text_math", "...", "key judges nothing"),
        ("image_chart", "NaN", "key is missing"),
        ("image_chart", '["25", "25 %"]', None),
        ("image_document", '["12 km", "12 kilometres"]', None),
        ("image_document", "...", None),
        ("image_logic", "L2 R3", None),
        ("additions", "five", "key judges nothing"),
        ("additions", "132", None),
        ("text_code", '{"inputs": ["3"], "outputs": [9]}', None),
        ("text_code", '{"inputs": ["3"], "outputs": [[1, 2]]}', None),
        ("text_code", '{"fn_name": "", "inputs": [[3]], "outputs": [9]}', "no tests"),
        ("text_code", '{"inputs": ["3"], "outputs": [""]}', "no tests"),
        ("text_code", "[" * 100_000, "no tests"),
    ],
    ids=str,
)
def test_a_key_is_tried_on_its_verifier(task: str, key: str, cause: str | None) -> None:
    found = fault(load_tasks()[task], key)
    assert (found[0] if found else None) == cause
    assert found is None or found[1]


def test_numbers_of_tables_are_written_out_and_missing_ones_are_refused() -> None:
    row = {"small": 1e-7, "whole": 3, "missing": math.nan, "list": [1, 2.5, "three"]}
    assert convert.text(row, "small") == "0.0000001"
    assert convert.text(row, "whole") == "3"
    assert convert.answers(row, "list") == '["1", "2.5", "three"]'
    with pytest.raises(RowError, match="missing"):
        convert.text(row, "missing")
