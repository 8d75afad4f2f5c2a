"""DeepMath-103K (`zwhe99/DeepMath-103K`, arXiv 2504.11456): mathematics in words, each problem with a final answer.

    mmopd prepare data/deepmath.py shards/deepmath --set min_difficulty=6

Columns as published: `question`, `final_answer`, `difficulty` (a number, mostly from 5 to 9), `topic`, `r1_solution_1`
to `_3`. The solutions are not read.
"""

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from mmopd.prompts import convert as columns
from mmopd.prompts.convert import SourceSettings
from mmopd.records import Prompt
from mmopd.task import Task


class Settings(SourceSettings):
    data: str = "zwhe99/DeepMath-103K"
    task: str = "text_math"
    question: str = "question"
    answer: str = "final_answer"
    difficulty: str = "difficulty"
    min_difficulty: float = Field(0.0, description="problems below this difficulty are not wanted")


def examples(settings: Settings) -> Iterable[Any]:
    return columns.read(settings, [settings.question, settings.answer, settings.difficulty])


def convert(example: dict[str, Any], settings: Settings, task: Task) -> Prompt | None:
    if settings.min_difficulty and float(columns.column(example, settings.difficulty)) < settings.min_difficulty:
        return None
    return columns.ask(task, "", columns.text(example, settings.question), columns.text(example, settings.answer))
