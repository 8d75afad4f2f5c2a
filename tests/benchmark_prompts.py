"""Renders the prompts of every task of the shipped suites for every family, with lmms-eval itself, on made-up rows.

`python tests/benchmark_prompts.py` rewrites `benchmark_prompts.txt`; read its difference before you commit it.
"""

import base64
import io
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

from mmopd.catalog import shipped
from mmopd.config.suite import LmmsBenchmark
from mmopd.evaluate import read_suite
from mmopd.evaluate.served import VARIANTS, Served
from mmopd.evaluate.tasks import prepare

REVIEWED = Path(__file__).with_suffix(".txt")
SUITES = sorted((shipped() / "eval").glob("*.yaml"))
PICTURE = Image.new("RGB", (32, 32))


def png() -> bytes:
    file = io.BytesIO()
    PICTURE.save(file, format="PNG")
    return file.getvalue()


DEMO: list[dict[str, Any]] = [{"question": "What is the sum?", "image": png(), "answer": "7"}]
PAGE: list[dict[str, Any]] = [{"question": "Which year is given?", "image": PICTURE, "answers": ["1999"]}]
MMMU: list[dict[str, Any]] = [
    {"question": "What does <image 1> show?", "options": "['a cat', 'a dog']", "question_type": "multiple-choice"},
    {"question": "How many are in <image 1>?", "options": "[]", "question_type": "open"},
]
# Rows of each task, in the columns that its functions read.
ROWS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "demo_additions.yaml": DEMO,
    "demo_digit_sum.yaml": DEMO,
    "ocrbench.yaml": [{"question": "what is written in the image?", "image": PICTURE, "answer": ["STOP"]}],
    "mathvision_test": [
        {"question": "How many?\n<image1>", "options": ["1", "2"], "decoded_image": PICTURE, "answer": "B"},
        {"question": "How long?\n<image1>", "options": [], "decoded_image": PICTURE, "answer": "5"},
    ],
    "dynamath_reasoning": [{"question": "What is x?", "decoded_image": PICTURE, "ground_truth": "0.5"}],
    "wemath_testmini_reasoning": [
        {"question": "How many?", "option": "A. 1; B. 2", "image_path": PICTURE, "answer": "B"}
    ],
    "logicvista_reasoning": [{"question": "Which comes next? A, B or C?", "image": PICTURE, "answer": "B"}],
    "visulogic": [{"question": "Which comes next?", "image_path": "images/0.png", "label": "B"}],
    "ai2d": [{"question": "What is A?", "options": ["leaf", "root"], "image": PICTURE, "answer": "1"}],
    "chartqa": [{"question": "How much?", "image": PICTURE, "answer": "5", "type": "human_test"}],
    "docvqa_val": PAGE,
    "infovqa_val": PAGE,
    "mmstar_oc": [
        {
            "question": "<image 1>What is it?",
            "image": base64.b64encode(png()).decode(),
            **dict(zip("ABCD", ("one", "two", "three", "four"), strict=True)),
            "answer": "B",
        }
    ],
    "mmmu_val": [{**row, "image_1": PICTURE, "answer": "A"} for row in MMMU],
    "mmmu_pro_standard": [{**MMMU[0], "image_1": PICTURE, "answer": "A"}],
}


def render_all() -> str:
    """Return the prompts of all tasks; families with the same prompts are named together."""
    os.environ.setdefault("OPENAI_API_KEY", "none")
    rows = [row for suite in SUITES for row in read_suite(suite, Path.cwd()).benchmarks]
    tasks = {row.task: row for row in rows if isinstance(row, LmmsBenchmark)}
    shown = []
    with tempfile.TemporaryDirectory() as folder, mock.patch("huggingface_hub.snapshot_download", return_value=folder):
        with zipfile.ZipFile(Path(folder) / "images.zip", "w") as archive:  # visulogic fetches it at import
            archive.writestr("images/0.png", png())
        for place, (name, benchmark) in enumerate(sorted(tasks.items())):
            shown += render_task(Path(name).name, benchmark, Path(folder) / str(place))
    return "\n".join(shown)


def render_task(name: str, benchmark: LmmsBenchmark, folder: Path) -> list[str]:
    """Return one text for each variant of the prompts that a family gets."""
    from datasets import Dataset
    from lmms_eval.tasks import TaskManager, get_task_dict

    folder.mkdir()
    local = benchmark.model_copy(update={"data": folder / "rows.parquet"})
    Dataset.from_list([dict(row) for row in ROWS[name]]).to_parquet(folder / "rows.parquet")
    families: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for family in VARIANTS:
        wanted = Served(family).variant
        task = prepare(local, folder / family, wanted)
        families.setdefault(task.variant, []).append(family)
        if task.variant not in texts:
            manager = TaskManager("ERROR", str(task.folder), include_defaults=False, model_name="openai")
            [loaded] = get_task_dict([task.name], manager, "chat").values()
            texts[task.variant] = "\n".join(render(loaded.doc_to_messages(row)) for row in loaded.task_docs)
    return [f"=== {name}, {variant}: {', '.join(members)}\n{texts[variant]}\n" for variant, members in families.items()]


def render(messages: list[dict[str, Any]]) -> str:
    """Return messages as text; <end> shows blanks at the end."""
    parts = [[p["text"] if p["type"] == "text" else f"<{p['type']}>" for p in m["content"]] for m in messages]
    return "\n".join(f"[{m['role']}]\n{''.join(texts)}<end>" for m, texts in zip(messages, parts, strict=True))


if __name__ == "__main__":
    REVIEWED.write_text(render_all(), encoding="utf-8")
