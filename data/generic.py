r"""Any table, a folder of tables or of images, a tar of another tool, or a data set of the hub (docs/your-data.md).

    mmopd prepare data/generic.py shards/mine --set data=mine.csv --set task=text_math
    mmopd prepare data/generic.py shards/mine --set data=photos/ --set task=image_math --set images=file_name
    mmopd prepare data/generic.py shards/birds --set data=birds/ --set task=birds --set images=file_name \
        --set answer=label --set "ask=Which bird?"
    mmopd prepare data/generic.py shards/digits --set data=digits.tar --set task=digits --set images=image \
        --set answer=cls --set "ask=Which digit?"

The settings name the columns; `a.b` is `b` inside of `a`. A folder without tables but with images has the columns
`file_name`, `name` (of the file) and `label` (the folder that it is in). A tar has the columns `key`, `image` (all
images of a key), and each member by its extension, such as `txt`, `cls` and `json`. Images stand where `<image>`
occurs in a question, or else before it; a row whose image column is empty is not wanted. An answer that is a list, of
texts or of numbers, becomes the JSON of several right answers; an object becomes its JSON.
"""

import json
from collections.abc import Iterable
from typing import Any

from pydantic import Field

from mmopd.prompts import convert as columns
from mmopd.prompts.convert import SourceSettings
from mmopd.records import Prompt
from mmopd.task import Task


class Settings(SourceSettings):
    question: str = "question"
    ask: str | None = Field(None, description="the question for all examples, if no column has one")
    answer: str = "answer"
    images: str | None = Field(None, description="column with one or several images; no images if not set")
    number: str | None = Field(None, description="column with the name of an example; its number if not set")
    extra: tuple[str, ...] = Field((), description="columns with further texts for views, such as caption")


def examples(settings: Settings) -> Iterable[Any]:
    named = [settings.answer, *settings.extra, *filter(None, [settings.images, settings.number])]
    return columns.read(settings, named if settings.ask else [settings.question, *named])


def convert(example: dict[str, Any], settings: Settings, task: Task) -> Prompt | None:
    value = columns.column(example, settings.answer)
    if settings.images and settings.images in example and example[settings.images] in (None, "", []):
        return None  # a row without images in a table of both kinds
    if isinstance(value, list):
        answer = columns.answers(example, settings.answer)
    elif isinstance(value, dict):
        answer = json.dumps(value, ensure_ascii=False)
    else:
        answer = columns.text(example, settings.answer)
    files = columns.images(example, settings.images, settings) if settings.images else []
    key = columns.text(example, settings.number) if settings.number else ""
    extra = {name: columns.text(example, name) for name in settings.extra}
    return columns.ask(task, key, settings.ask or columns.text(example, settings.question), answer, files, extra=extra)
