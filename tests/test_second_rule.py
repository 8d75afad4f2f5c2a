"""OpenMMReasoner's rule: the keys that lmms-eval takes for a letter are compared as text or as mathematics."""

from typing import Any

import pytest

from mmopd.evaluate.second_rule import NAME, score, second_verdict


def sample(key: str, response: str, **more: Any) -> dict[str, Any]:
    return {"doc_id": 0, "target": key, "filtered_resps": response, **more}


@pytest.mark.parametrize(
    ("key", "response", "right"),
    [
        ("B, D", "<answer>B</answer>", False),
        ("B, D", "<answer>B, D.</answer>", True),
        ("Brown", "<answer>Blue</answer>", False),
        ("Brown", "<answer>Brow</answer>", False),  # four fifths of it
        ("Decreasing", r"It is \boxed{Decreasin}", True),  # nine tenths of it
        ("Decreasing", r"\boxed{Increasing} \boxed{Decreasing", False),  # the last box does not end
        ("BC = 5", r"\boxed{BC = 7}", False),
        ("BC = 5", r"\boxed{$\frac{10}{2}$}", True),
        ("12 Cm", "I count them.\nThe answer is 12.", True),
        ("12 Cm", "The answer is A", False),
    ],
)
def test_a_key_that_is_not_one_letter_is_no_choice(key: str, response: str, right: bool) -> None:
    for first in (0.0, 1.0):
        assert second_verdict(sample(key, response), first) == right


@pytest.mark.parametrize("key", ["B", "12", r"\frac{1}{2}", "yes"])
@pytest.mark.parametrize("first", [0.0, 1.0])
def test_for_all_other_keys_both_rules_are_the_same(key: str, first: float) -> None:
    assert second_verdict(sample(key, "<answer>something</answer>"), first) == first


def test_variants_count_within_their_question() -> None:
    rows = [("0", 1), ("0", 1), ("0", 0), ("0", 0), ("1", 1)]
    samples = [sample("5", "5", average={"acc": acc, "variant_id": question}) for question, acc in rows]
    assert score(samples, "average") == {NAME: 75.0, f"{NAME}_stderr": pytest.approx(25.0)}


@pytest.mark.parametrize("verdict", [{}, {"acc_score": 0.5}, {"acc_score": {"parsed_pred": "B"}}])
def test_a_task_that_gives_other_verdicts_is_refused(verdict: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not right or wrong"):
        score([sample("B", "B", **verdict)], "acc_score")
