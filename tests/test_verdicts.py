"""Verdicts in lmms-eval's samples, in the forms of its tasks, and the error of a score for which it gives none."""

from typing import Any

import pytest

from mmopd.evaluate.verdicts import Verdict, over_questions, verdict


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (1.0, Verdict(7, 1.0)),
        ({"response": ["B"], "scores": [True]}, Verdict(7, 1.0)),  # MathVision
        ({"acc": 0, "question_id": "3", "variant_id": "q"}, Verdict("q", 0.0)),  # DynaMath
        ({"question_id": 1, "l2_category": "c", "score": 0.5}, None),  # MMStar, whose score is over categories
        ({"answer": "A", "parsed_pred": ["A"]}, None),  # MMMU
        ({"scores": [True, False]}, None),
        (float("nan"), None),
        ("1", None),
    ],
)
def test_a_verdict_is_read_in_the_forms_of_the_tasks(written: Any, read: Verdict | None) -> None:
    assert verdict({"doc_id": 7, "m": written}, "m") == read
    assert verdict({"doc_id": 7}, "m") is None


def test_the_error_is_over_questions_and_not_over_their_variants() -> None:
    alone = [Verdict(i, value) for i, value in enumerate((1.0, 1.0, 0.0, 0.0))]
    assert over_questions(alone) == (0.5, pytest.approx((0.25 / 3) ** 0.5))
    assert over_questions([*alone, *alone, *alone]) == over_questions(alone)
    assert over_questions(alone[:1]) == (1.0, None)
