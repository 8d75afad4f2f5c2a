"""Tries an answer key on its verifier when shards are written, so that no row has a key that judges nothing."""

import re
from collections.abc import Callable, Mapping

from mmopd.records import Outcome
from mmopd.task import code, documents, verify
from mmopd.task.base import Task
from mmopd.task.response import gold_answers

# How a response gives an answer to each verifier; verifiers of a workspace are not tried.
SAYS: Mapping[Callable[[str, str], Outcome], str] = {
    verify.math: r"\boxed{ANSWER}",
    verify.choice: r"\boxed{ANSWER}",
    verify.puzzle: r"\boxed{ANSWER}",
    verify.exact: r"<answer>ANSWER</answer>",
    documents.relaxed_number: r"<answer>ANSWER</answer>",
    documents.anls: r"<answer>ANSWER</answer>",
    verify.final_number: "ANSWER",
    verify.number_after_equals: "= ANSWER",
}
MISSING = re.compile(r"\s*(?:nan|null|<na>)\s*", re.IGNORECASE)  # what tables write for a missing answer


def fault(task: Task, answer: str) -> tuple[str, str] | None:
    """Return (cause, detail) if a key judges nothing, or its own text does not satisfy it; None if it can be used."""
    if isinstance(task.verify, code.Programs):
        try:
            code.read_key(answer)
        except (ValueError, RecursionError) as error:
            return "no tests", f"its key has no tests: {error}"
        return None
    if (form := SAYS.get(task.verify)) is None:
        return None
    golds = gold_answers(answer)
    if missing := [gold for gold in golds if MISSING.fullmatch(gold)]:
        return "key is missing", f"its answer is {missing[0]!r}, which tables write where there is none"
    outcomes = [task.verify(form.replace("ANSWER", gold), answer) for gold in golds]
    if unknown := [outcome for outcome in outcomes if not outcome.known]:
        return "key judges nothing", unknown[0].reason
    if refused := [gold for gold, outcome in zip(golds, outcomes, strict=True) if outcome.value != 1]:
        return "key refuses itself", f"{task.name!r} does not accept the answer {refused[0][:100]!r} of its own key"
    return None
