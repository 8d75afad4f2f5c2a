"""OpenMMReasoner-RL-74K (`OpenMMReasoner/OpenMMReasoner-RL-74K`, arXiv 2511.16334): one call for each subset.

    mmopd prepare data/openmmreasoner.py shards/mmk12 --set subset=mmk12
    mmopd prepare data/openmmreasoner.py shards/puzzlevqa --set subset=puzzlevqa --set task=image_choice

Subsets: `mmk12`, `wemath_standard`, `wemath_pro` (the paper's mathematics), `algopuzzle`, `puzzlevqa`,
`thinklite_vl_hard` (its logic), `tqa`, `virl39k`. Columns as the authors' trainer reads them: `prompt` (a chat;
`<image>` in a text stands for an image), `images`, `reward_model` (`ground_truth`, `style`), `data_source`,
`extra_info`. System turns are left out. The request for an answer format, from `instruction` to the end of the user's
turn, is left out too: the task has its own.
"""

from collections.abc import Iterable
from typing import Any

from pydantic import Field

from mmopd.prompts import RowError
from mmopd.prompts import convert as columns
from mmopd.prompts.convert import SourceSettings
from mmopd.records import Prompt
from mmopd.task import Task


class Settings(SourceSettings):
    data: str = "OpenMMReasoner/OpenMMReasoner-RL-74K"
    subset: str | None = Field(None, description="one of the subsets above; all if not set")
    task: str = "image_math"
    prompt: str = "prompt"
    images: str = "images"
    answer: str = "reward_model.ground_truth"
    instruction: str = Field("", description="first words of the request for an answer format, if there is one")


def examples(settings: Settings) -> Iterable[Any]:
    return columns.read(settings, [settings.prompt, settings.images, settings.answer])


def convert(example: dict[str, Any], settings: Settings, task: Task) -> Prompt:
    turns = [said(turn["content"]) for turn in columns.column(example, settings.prompt) if turn["role"] == "user"]
    if len(turns) != 1:
        raise RowError("no single question", f"{len(turns)} user turns in {settings.prompt!r}")
    question = turns[0].partition(settings.instruction)[0] if settings.instruction else turns[0]
    files = columns.images(example, settings.images, settings)
    return columns.ask(task, "", question.strip(), columns.text(example, settings.answer), files)


def said(content: str | list[dict[str, Any]]) -> str:
    """Return the text of a turn, with `<image>` where images stand."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or columns.PLACEHOLDER for part in content)
