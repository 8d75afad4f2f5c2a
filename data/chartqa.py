"""ChartQA (`HuggingFaceM4/ChartQA`, ACL 2022): questions on charts, answered by a number or a few words.

    mmopd prepare data/chartqa.py shards/chartqa

Columns as published: `image`, `query`, `label` (a list with one answer), `human_or_machine` (0: a person wrote the
question, 1: a model did). The answer key is a JSON list of the right answers.
"""

from collections.abc import Iterable
from typing import Any

from mmopd.prompts import convert as columns
from mmopd.prompts.convert import SourceSettings
from mmopd.records import Prompt
from mmopd.task import Task


class Settings(SourceSettings):
    data: str = "HuggingFaceM4/ChartQA"
    task: str = "image_chart"
    image: str = "image"
    question: str = "query"
    answer: str = "label"
    origin: str = "human_or_machine"
    human_only: bool = False


def examples(settings: Settings) -> Iterable[Any]:
    return columns.read(settings, [settings.image, settings.question, settings.answer, settings.origin])


def convert(example: dict[str, Any], settings: Settings, task: Task) -> Prompt | None:
    if settings.human_only and columns.column(example, settings.origin) != 0:
        return None
    files = columns.images(example, settings.image, settings)
    return columns.ask(
        task, "", columns.text(example, settings.question), columns.answers(example, settings.answer), files
    )
