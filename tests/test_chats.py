"""`data/chat.py`: chats of LLaVA's and of OpenAI's form become rows, and damaged ones are counted by their cause."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmopd.prompts.prepare import Count, prepare
from mmopd.prompts.shards import Shards
from mmopd.records import Prompt

CHAT = Path(__file__).parents[1] / "data" / "chat.py"
TASK = """
from mmopd.task import Task
from mmopd.task.base import user_turn
task = Task(name="{0}", modality="{0}", messages=lambda question, images: user_turn(question + " Be brief.", images))
"""


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


CAT, DOG = picture(1), picture(2)
URL = "data:image/png;base64," + base64.b64encode(DOG).decode()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("modalities").mkdir()
    for modality in ("text", "image"):
        Path(f"modalities/{modality}.py").write_text(TASK.format(modality), encoding="utf-8")
    Path("images").mkdir()
    Path("images/cat.png").write_bytes(CAT)
    Path("outside.png").write_bytes(CAT)
    return tmp_path


def made(rows: list[Any], *settings: str, form: str = "json", task: str = "image") -> tuple[Shards, Count]:
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), "rows.parquet")
    else:
        text = json.dumps(rows) if form == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        Path(f"rows.{form}").write_text(text, encoding="utf-8")
    return prepare(CHAT, Path("out"), [f"data=rows.{form}", "root=images", f"task={task}", *settings], max_bad=1.0)


def shown(prompt: Prompt) -> list[tuple[str, list[str]]]:
    """Return each message as its role and its parts."""
    return [
        (message["role"], [part.get("text", part["type"]) for part in message["content"]])
        if isinstance(message["content"], list)
        else (message["role"], [message["content"]])
        for message in prompt.messages
    ]


def llava(*turns: str, **changes: Any) -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"id": "000", "image": "cat.png", "conversations": said, **changes}


def openai(*parts: Any, answer: Any = "A cat.", **changes: Any) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **changes}


def at(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_a_chat_of_llava(form: str) -> None:
    rows = [
        llava("<image>\nWhat is it?", "A cat."),
        llava("What is it?\n<image>", "A cat."),
        llava("What is it?", "A cat."),
        llava("<image>\nWhat is it?", "A cat.", "Which colour?", "Black."),
    ]
    shards, count = made(rows, form=form)
    assert [shown(row) for row in shards] == [
        [("user", ["image", "What is it? Be brief."])],
        [("user", ["What is it?", "image", " Be brief."])],
        [("user", ["image", "What is it? Be brief."])],
        [("user", ["image", "What is it?"]), ("assistant", ["A cat."]), ("user", ["Which colour? Be brief."])],
    ]
    assert [row.answer for row in shards] == ["A cat.", "A cat.", "A cat.", "Black."]
    assert {row.images for row in shards} == {(CAT,)}
    assert count.left_out == {}


def test_a_chat_of_llava_with_several_images_and_a_system_turn() -> None:
    system = {"from": "system", "value": "You see well."}
    row = llava("<image> or <image>?", "The first.", image=["cat.png", URL])
    row["conversations"].insert(0, system)
    (only,) = made([row])[0]
    assert shown(only) == [("system", ["You see well."]), ("user", ["image", " or ", "image", "? Be brief."])]
    assert only.images == (CAT, DOG)


def test_a_chat_of_openai() -> None:
    rows = [
        openai(at(URL), "What is it?"),
        openai("From", {"type": "image_url", "image_url": "cat.png"}, "to", at(URL), "?"),
        openai({"type": "input_image", "image_url": URL}, {"type": "input_text", "text": "What is it?"}),
        openai({"type": "image"}, "What is it?", images=["cat.png"]),
        openai({"type": "image", "image": "file://" + str(Path("images/cat.png").resolve())}, "What is it?"),
        openai(at(URL), "What?", answer=[{"type": "text", "text": "A cat."}]),
        {"messages": openai(at(URL), "What is it?")["messages"][:1], "gold": 7},
    ]
    shards, count = made(rows[:-1], form="jsonl")
    assert count.left_out == {}
    assert [row.images for row in shards] == [(DOG,), (CAT, DOG), (DOG,), (CAT,), (CAT,), (DOG,)]
    assert shown(shards[1]) == [("user", ["From", "image", "to", "image", "? Be brief."])]
    assert {row.answer for row in shards} == {"A cat."}
    Path("out").rename("first")
    assert [row.answer for row in made([rows[-1], rows[0] | {"gold": "8"}], "answer=gold")[0]] == ["7", "8"]


def test_text_alone_is_for_a_task_on_text_and_the_others_are_not_wanted() -> None:
    rows = [
        llava("What is <image> in HTML?", "A tag.", image=None),
        llava("<image> What?", "A cat."),
        openai("1+1?", answer="2"),
        {"messages": [{"role": "developer", "content": "Be exact."}, *openai("1+2?", answer="3")["messages"]]},
    ]
    shards, count = made(rows, task="text")
    assert (count.not_wanted, count.left_out) == (1, {})
    assert shown(shards[0]) == [("user", ["What is <image> in HTML? Be brief."])]
    assert shown(shards[2]) == [("system", ["Be exact."]), ("user", ["1+2? Be brief."])]


def test_damaged_chats_are_counted_by_cause() -> None:
    good = llava("<image>\nWhat is it?", "A cat.")
    damaged: dict[str, list[Any]] = {
        "no object": [5, [good]],
        "no conversations": [{"id": "1"}, llava(conversations=None)],
        "no turns": [llava(), llava(conversations="What?"), llava(conversations={})],
        "bad turn": [
            llava(conversations=["What?"]),
            openai(answer=None, messages=[{"role": "user", "content": None}]),
            openai("What?", messages=[{"role": "user", "content": []}]),
            openai("What?", answer=None),
        ],
        "unknown role": [
            llava(conversations=[{"from": "bing", "value": "?"}]),
            llava(conversations=[{"value": "?"}]),
            llava(conversations=[{"from": ["human"], "value": "?"}]),
        ],
        "unknown part": [
            openai({"type": "input_audio", "input_audio": {"data": ""}}, "What?"),
            openai({"text": "What?"}),
            openai(None, "What?"),
        ],
        "no answer": [llava("What?"), llava("What?", " "), openai("What?", answer=" ")],
        "no question": [
            llava(conversations=[{"from": "gpt", "value": "A cat."}]),
            llava("<image>\n", "A cat."),
            openai(at(URL), answer="A cat."),
        ],
        "images do not match": [
            llava("<image><image>?", "A cat."),
            llava("<image>?", "A cat.", image=["cat.png"] * 2),
            openai({"type": "image"}, "What?"),
            openai(at(URL), "What is <image>?"),
            llava("<image>?", "A cat.", image=None),
            llava("What?", "<image>"),
        ],
        "image by URL": [
            openai(at("https://example.org/cat.png"), "What?"),
            llava("<image>?", "A cat.", image="http://169.254.169.254/"),
        ],
        "outside of the data": [
            openai(at("file:///etc/passwd"), "What?"),
            llava("<image>?", "A cat.", image="../outside.png"),
        ],
        "no image file": [llava("<image>?", "A cat.", image="nowhere.png")],
        "bad image": [
            openai(at("data:image/png;base64,abc"), "What?"),
            openai(at(5), "What?"),
            openai(at(URL[:60]), "What?"),
        ],
    }
    rows = [good, *(row for some in damaged.values() for row in some), good]
    shards, count = made(rows, form="jsonl")
    assert (len(shards), count.not_wanted) == (2, 0)
    assert count.left_out == {cause: len(some) for cause, some in damaged.items()}
