"""The code part of Eurus-2-RL-Data (`PRIME-RL/Eurus-2-RL-Data`, arXiv 2502.01456): problems with unit tests.

    mmopd prepare data/eurus_code.py shards/eurus_code

Columns as published: `data_source`, `prompt` (a chat: a system turn with the authors' own actions, then the problem),
`ability` (`code` or `math`), `reward_model` (`ground_truth`: JSON with `inputs` and `outputs`, and with `fn_name` where
a function is called instead of reading standard input; `style`), `extra_info` (`split`, `index`). The answer key is
that JSON. The system turn and the request for an answer format are left out: the task has its own.
"""

import json
from collections.abc import Iterable
from typing import Any

from mmopd.prompts import RowError
from mmopd.prompts import convert as columns
from mmopd.prompts.convert import SourceSettings
from mmopd.records import Prompt
from mmopd.task import Task

REQUEST = "Write Python code to solve the problem."  # this text and what follows it are left out


class Settings(SourceSettings):
    data: str = "PRIME-RL/Eurus-2-RL-Data"
    task: str = "text_code"
    prompt: str = "prompt"
    tests: str = "reward_model.ground_truth"
    ability: str = "ability"
    wanted: str = "code"
    source: str = "data_source"
    number: str = "extra_info.index"


def examples(settings: Settings) -> Iterable[Any]:
    return columns.read(settings, [settings.prompt, settings.tests, settings.ability, settings.source, settings.number])


def convert(example: dict[str, Any], settings: Settings, task: Task) -> Prompt | None:
    if columns.text(example, settings.ability) != settings.wanted:
        return None
    turns = [turn["content"] for turn in columns.column(example, settings.prompt) if turn["role"] == "user"]
    if len(turns) != 1:
        raise RowError("no single question", f"{len(turns)} user turns in {settings.prompt!r}")
    question = turns[0].partition(REQUEST)[0].strip()
    key = f"{columns.text(example, settings.source)}/{columns.text(example, settings.number)}"
    return columns.ask(task, key, question, unit_tests(columns.column(example, settings.tests)))


def unit_tests(given: Any) -> str:
    """Return the tests as JSON, as published, after checking that they are tests."""
    tests = json.loads(given) if isinstance(given, str) else given
    inputs = tests.get("inputs")
    outputs = tests.get("outputs")
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0):
        raise RowError("no tests", f"inputs and outputs of the same number are needed, and there are {list(tests)}")
    kept = {key: tests[key] for key in ("fn_name", "inputs", "outputs") if tests.get(key) is not None}
    return json.dumps(kept, ensure_ascii=False)
