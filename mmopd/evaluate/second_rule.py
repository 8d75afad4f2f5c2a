"""OpenMMReasoner's rule on responses that lmms-eval has judged: letters are compared only where the key is one letter.

lmms-eval 0.7.3 takes every key with a letter from A to H in it for that letter: for the key `B, D` it accepts `B`, and
for `Brown` it accepts `Blue`. The rule of OpenMMReasoner (custom_rewards/lmms_lab_recipe.py, commit 67441eb) compares
such a key as text, nine tenths of which must agree, or as mathematics. The two rules differ in nothing else, so that
only these responses are judged again. Without its judge model, as here, this is the whole of OpenMMReasoner's rule.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmopd.evaluate.verdicts import over_questions, verdict

NAME = "OpenMMReasoner's rule"
FILE = "second_rule.json"
LETTERS = frozenset("ABCDEFGH")
NEAR = 0.9  # share of a key or an answer that the other must contain
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
BOXED = re.compile(r"\\boxed\{")
LAST_NUMBER = re.compile(r"\b(\d+(?:\.\d+)?)\b\s*\.?\s*$")


def judge(output: Path, task: str, metric: str) -> None:
    """Judge the samples that lmms-eval wrote below `output`, and write `FILE` there, with the numbers of `score`.

    Args:
        task: its name in lmms-eval.
        metric: the key of the first rule's score in lmms-eval's results.

    Raises:
        ValueError: the task is not judged by the first rule.
    """
    [file] = output.rglob(f"*_samples_{task}.jsonl")
    with file.open(encoding="utf-8") as lines:
        numbers = score([json.loads(line) for line in lines], metric.partition(",")[0])
    (output / FILE).write_text(json.dumps(numbers), encoding="utf-8")


def score(samples: Sequence[Mapping[str, Any]], metric: str) -> dict[str, float]:
    """Return the mean verdict on 0-100 and its standard error, over questions.

    DynaMath asks variants of each question: the mean is over questions, of the mean over their variants.

    Raises:
        ValueError: a sample has no verdict of `metric`, or one between right and wrong.
    """
    second = []
    for sample in samples:
        first = verdict(sample, metric)
        if first is None or first.value not in (0, 1):
            raise ValueError(f"second_rule: {metric} of a response is {sample.get(metric)!r}, not right or wrong")
        second.append(first._replace(value=second_verdict(sample, first.value)))
    mean, error = over_questions(second)
    return {NAME: 100 * mean} | ({} if error is None else {f"{NAME}_stderr": 100 * error})


def second_verdict(sample: Mapping[str, Any], first: float) -> float:
    """Return 1 for a right response by OpenMMReasoner's rule, otherwise 0, given the verdict of lmms-eval."""
    key = _bare(sample["target"])
    if len(key) == 1 or LETTERS.isdisjoint(key):
        return first
    response = sample["filtered_resps"]
    answer = _bare(_answer((response if isinstance(response, str) else response[0]).strip()).strip())
    return float(_agree(answer, key) or _agree(key, answer) or answer == key or _same_mathematics(key, answer))


def _bare(text: str) -> str:
    return text.removesuffix(".").strip()


def _agree(part: str, whole: str) -> bool:
    return part in whole and len(part) >= NEAR * len(whole)


def _answer(response: str) -> str:
    """Return what is in the first `<answer>`, in the last box that ends, or the last number that ends a line."""
    if tagged := TAGGED.search(response):
        return tagged[1]
    if boxed := _boxed(response):
        return boxed
    numbers = (LAST_NUMBER.search(line) for line in reversed(response.split("\n")))
    return next((number[1] for number in numbers if number), "")


def _boxed(response: str) -> str:
    for start in reversed([found.end() for found in BOXED.finditer(response)]):
        depth = 1
        for end in range(start, len(response)):
            depth += (response[end] == "{") - (response[end] == "}")
            if depth == 0:
                return response[start:end]
    return ""


def _same_mathematics(key: str, answer: str) -> bool:
    import math_verify  # takes a second, and few keys need it

    try:  # its time limits are signals, so that this runs in the main thread of a call of lmms-eval
        return bool(math_verify.verify(math_verify.parse(key), math_verify.parse(answer)))
    except Exception:  # as both rules do
        return False
