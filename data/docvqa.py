"""DocVQA and InfographicVQA (docvqa.org; on the hub `lmms-lab/DocVQA`): questions on pages.

    mmopd prepare data/docvqa.py shards/infovqa --set subset=InfographicVQA --set split=validation
    mmopd prepare data/docvqa.py shards/docvqa --set data=docvqa/train_v1.0.json --set image=image

The subsets on the hub are `DocVQA` and `InfographicVQA`, with the validation and test parts only. The training part
comes from docvqa.org, as a .json file with image paths (`image` for DocVQA; `image_local_name` for InfographicVQA, with
`root` for the folder of the images). Columns as published: `questionId`, `question`, `answers` (one or several right
answers), `image`. The answer key is a JSON list of the answers.
"""

from collections.abc import Iterable
from typing import Any

from mmopd.prompts import convert as columns
from mmopd.prompts.convert import SourceSettings
from mmopd.records import Prompt
from mmopd.task import Task


class Settings(SourceSettings):
    data: str = "lmms-lab/DocVQA"
    subset: str | None = "DocVQA"
    task: str = "image_document"
    number: str = "questionId"
    image: str = "image"
    question: str = "question"
    answer: str = "answers"


def examples(settings: Settings) -> Iterable[Any]:
    return columns.read(settings, [settings.number, settings.image, settings.question, settings.answer])


def convert(example: dict[str, Any], settings: Settings, task: Task) -> Prompt:
    files = columns.images(example, settings.image, settings)
    key = columns.text(example, settings.number)
    return columns.ask(
        task, key, columns.text(example, settings.question), columns.answers(example, settings.answer), files
    )
