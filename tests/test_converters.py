"""The converters of `data/`: rows of the published schema become prompts, and a row that does not fit is named."""

import io
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmopd.errors import UserError
from mmopd.prompts import Shards
from mmopd.prompts.prepare import Count, prepare
from mmopd.records import Prompt
from mmopd.task.load import load_tasks

DATA = Path(__file__).parents[1] / "data"
TASK = """
from mmopd.task import Task, verify
task = Task(name="{name}", modality="{modality}", verify=verify.exact)
"""


def picture(shade: int, size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, format=form)
    return file.getvalue()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty workspace; tasks that are not shipped are created in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "modalities").mkdir()
    for name, modality in {"text_code": "text", "image_chart": "image", "image_document": "image"}.items():
        if name not in load_tasks():
            (tmp_path / "modalities" / f"{name}.py").write_text(
                TASK.format(name=name, modality=modality), encoding="utf-8"
            )
    return tmp_path


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def run(name: str, *settings: str, max_bad: float = 0.0) -> tuple[Shards, Count]:
    return prepare(DATA / f"{name}.py", Path("out"), settings, max_bad=max_bad)


def asked(prompt: Prompt) -> list[str]:
    """Return the parts of the one user turn: `<image>`, or the text."""
    (message,) = prompt.messages
    return [part.get("text", "<image>") for part in message["content"]]


def stored(files: Iterable[bytes]) -> list[dict[str, Any]]:
    """Return images as the hub stores them."""
    return [{"bytes": file, "path": f"{i}.png"} for i, file in enumerate(files)]


def deepmath(n: int) -> list[dict[str, Any]]:
    rest = {"topic": "Mathematics -> Algebra", **{f"r1_solution_{k}": "long" * 100 for k in (1, 2, 3)}}
    return [
        {"question": f"Find ${i}^2$.", "final_answer": f"{i * i}", "difficulty": 4.0 + i % 6, **rest} for i in range(n)
    ]


def test_deepmath() -> None:
    table(Path("deepmath/data/train-00000-of-00002.parquet"), deepmath(100)[:50])
    table(Path("deepmath/data/train-00001-of-00002.parquet"), deepmath(100)[50:])
    table(Path("deepmath/data/test-00000-of-00001.parquet"), deepmath(3))
    shards, count = run("deepmath", "data=deepmath", "min_difficulty=6")
    assert [row.answer for row in shards] == [str(i * i) for i in range(100) if 4 + i % 6 >= 6]
    assert count.not_wanted == 100 - len(shards)
    assert asked(shards[0])[0].startswith("Find $2^2$.")
    assert {row.task for row in shards} == {"text_math"}


def eurus(i: int, **changes: Any) -> dict[str, Any]:
    tests = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
    question = (
        f"Problem {i}: add.\n\nWrite Python code to solve the problem. "
        "Present the code in \n```python\nYour code\n```\nat the end."
    )
    return {
        "data_source": "taco",
        "prompt": [
            {"content": "\nWhen tackling complex reasoning tasks, ...", "role": "system"},
            {"content": question, "role": "user"},
        ],
        "ability": "code",
        "reward_model": {"ground_truth": json.dumps(tests), "style": "rule"},
        "extra_info": {"index": i, "split": "train"},
        **changes,
    }


def test_eurus_code() -> None:
    called = json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]})
    rows = [
        eurus(0),
        eurus(1, ability="math", data_source="numina_olympiads", reward_model={"ground_truth": "7", "style": "rule"}),
        eurus(2, reward_model={"ground_truth": called, "style": "rule"}),
        eurus(3, reward_model={"ground_truth": json.dumps({"inputs": ["1"], "outputs": []}), "style": "rule"}),
        eurus(4, reward_model={"ground_truth": "{", "style": "rule"}),
    ]
    shards, count = run("eurus_code", f"data={table(Path('eurus.parquet'), rows)}", max_bad=0.5)
    assert [json.loads(row.answer) for row in shards] == [
        {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]},
        {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]},
    ]
    assert asked(shards[0])[0].startswith("Problem 0: add.")
    assert "Present the code in" not in asked(shards[0])[0].partition("\n")[0]
    assert [message["role"] for message in shards[0].messages] == ["user"]
    assert (count.not_wanted, count.left_out) == (1, {"no tests": 1, "JSONDecodeError": 1})


MATHS = ("mmk12", "wemath_standard", "wemath_pro", "tqa", "virl39k")
LOGIC = ("algopuzzle", "puzzlevqa", "thinklite_vl_hard")


def openmmreasoner(subset: str, i: int, files: list[bytes], question: str) -> dict[str, Any]:
    return {
        "data_source": subset,
        "prompt": [{"role": "system", "content": "Think first."}, {"role": "user", "content": question}],
        "images": stored(files),
        "ability": "math",
        "reward_model": {"ground_truth": "AB"[i % 2], "style": "rule"},
        "extra_info": {"index": str(i), "split": "train"},
    }


@pytest.mark.parametrize("subset", MATHS + LOGIC)
def test_openmmreasoner(subset: str) -> None:
    for name in MATHS + LOGIC:
        rows = [openmmreasoner(name, i, [picture(i)], f"<image>{name} {i}? Answer in <answer>.") for i in range(3)]
        table(Path(f"rl74k/{name}_train.parquet" if not name.startswith("wemath") else f"rl74k/{name}.parquet"), rows)
    task = "image_choice" if subset in LOGIC else "image_math"
    shards, _ = run("openmmreasoner", "data=rl74k", f"subset={subset}", f"task={task}", "instruction= Answer in")
    assert [asked(row)[0] for row in shards] == ["<image>"] * 3
    assert [asked(row)[1].partition("\n")[0] for row in shards] == [f"{subset} {i}?" for i in range(3)]
    assert [row.images for row in shards] == [(picture(i),) for i in range(3)]
    assert [row.answer for row in shards] == ["A", "B", "A"]


def test_images_stay_where_the_question_has_them() -> None:
    files = [picture(1), picture(2)]
    rows = [
        openmmreasoner("mmk12", 0, files, "From <image> to\n<image>: which?"),
        openmmreasoner("mmk12", 1, files, "One <image>?"),
    ]
    shards, count = run("openmmreasoner", f"data={table(Path('x.parquet'), rows)}", max_bad=0.5)

    assert asked(shards[0])[:4] == ["From ", "<image>", " to", "<image>"]
    assert shards[0].images == tuple(files)
    assert count.left_out == {"images do not match": 1}


def test_chartqa() -> None:
    rows = [
        {
            "image": stored([picture(i)])[0],
            "query": f"How many in {i}?",
            "label": [f"{i}.5 "],
            "human_or_machine": i % 2,
        }
        for i in range(4)
    ]
    path = table(Path("chartqa/train-00000-of-00001.parquet"), rows)
    shards, _ = run("chartqa", f"data={path}")
    assert [row.answer for row in shards] == ['["0.5"]', '["1.5"]', '["2.5"]', '["3.5"]']
    assert asked(shards[3])[0] == "<image>"
    assert asked(shards[3])[1].startswith("How many in 3?")
    Path("out").rename("all")
    assert [row.images[0] for row in run("chartqa", f"data={path}", "human_only=true")[0]] == [picture(0), picture(2)]


def test_docvqa_from_the_hub_and_from_its_own_files() -> None:
    rows = [
        {
            "questionId": str(i),
            "question": "Which year?",
            "question_types": ["form"],
            "image": stored([picture(i)])[0],
            "docId": i,
        }
        | {
            "ucsf_document_id": "x",
            "ucsf_document_page_no": "1",
            "answers": ["1999", "in 1999", "1999"][: i + 1],
            "data_split": "val",
        }
        for i in range(3)
    ]
    table(Path("hub/DocVQA/validation-00000-of-00001.parquet"), rows)
    table(Path("hub/InfographicVQA/validation-00000-of-00001.parquet"), rows[:1])
    shards, _ = run("docvqa", "data=hub", "split=validation")
    assert [json.loads(row.answer) for row in shards] == [["1999"], ["1999", "in 1999"], ["1999", "in 1999"]]
    Path("out").rename("hub_out")
    assert len(run("docvqa", "data=hub", "subset=InfographicVQA", "split=validation")[0]) == 1
    Path("out").rename("info_out")
    Path("documents").mkdir()
    Path("documents/a_1.png").write_bytes(picture(9))
    own = [
        {
            "questionId": 337,
            "question": "Who?",
            "image": "documents/a_1.png",
            "docId": 279,
            "answers": ["itc limited"],
            "data_split": "train",
        }
    ]
    Path("train_v1.0.json").write_text(json.dumps({"dataset_name": "SP-DocVQA", "data": own}), encoding="utf-8")
    shards, _ = run("docvqa", "data=train_v1.0.json")
    assert (shards[0].images, shards[0].answer) == ((picture(9),), '["itc limited"]')


def as_jsonl(rows: list[dict[str, Any]]) -> str:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "rows.jsonl"


def as_json(rows: list[dict[str, Any]]) -> str:
    Path("rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return "rows.json"


def as_parquet(rows: list[dict[str, Any]]) -> str:
    return str(table(Path("rows/part.parquet"), rows))


def as_saved(rows: list[dict[str, Any]]) -> str:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk("saved")
    return "saved"


@pytest.mark.parametrize("form", [as_jsonl, as_json, as_parquet, as_saved])
def test_generic_tables(form: Callable[[list[dict[str, Any]]], str]) -> None:
    rows = [
        {"id": f"r{i}", "text": {"q": f"What is {i}+1?"}, "gold": f"{i + 1}", "caption": f"sum {i}"} for i in range(200)
    ]
    named = ["question=text.q", "answer=gold", "number=id", "extra=[caption]", "limit=150"]
    shards, count = run("generic", f"data={form(rows)}", "task=text_math", *named)
    assert [row.answer for row in shards] == [str(i + 1) for i in range(150)]
    assert asked(shards[5])[0].startswith("What is 5+1?")
    assert shards[5].extra == {"caption": "sum 5"}
    assert count.examples == 150


def test_generic_images_by_path_and_by_folder() -> None:
    for label, shade in (("cat", 10), ("dog", 20)):
        Path("pets", label).mkdir(parents=True)
        Path("pets", label, f"{shade}.png").write_bytes(picture(shade))
    Path("pets.jsonl").write_text(
        json.dumps({"question": "Which?", "answer": ["cat", "a cat"], "file": ["pets/cat/10.png", "pets/dog/20.png"]}),
        encoding="utf-8",
    )
    shards, _ = run("generic", "data=pets.jsonl", "task=image_math", "images=file")
    assert shards[0].images == (picture(10), picture(20))
    assert json.loads(shards[0].answer) == ["cat", "a cat"]
    Path("out").rename("paths")
    shards, _ = run("generic", "data=pets", "task=image_math", "images=file_name", "answer=label", "ask=Which pet?")
    assert [(row.answer, row.images) for row in shards] == [("cat", (picture(10),)), ("dog", (picture(20),))]


def test_a_data_set_of_the_hub_is_read_as_it_is_stored() -> None:
    rows = {"question": ["a?", "b?"], "answer": ["1", "2"], "image": [stored([picture(i)])[0] for i in range(2)]}
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk("saved")
    shards, _ = run("generic", "data=saved", "task=image_math", "images=image")
    assert [row.images[0] for row in shards] == [picture(0), picture(1)]


def test_the_converter_of_the_readme_works(here: Path) -> None:
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (DATA / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    (here / "riddles.py").write_text(code, encoding="utf-8")
    (here / "riddles.jsonl").write_text('{"riddle": "1+1?", "solution": 2}\n', encoding="utf-8")
    shards, _ = prepare(here / "riddles.py", here / "out")
    assert shards[0].answer == "2"
    named = set(re.findall(r"^\| `(\w+\.py)`", (DATA / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert named == {path.name for path in DATA.glob("*.py")}


def test_what_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"zwhe99/DeepMath-103K: not a local file or folder, and the hub cannot be read"
    ):
        run("deepmath")
    whole = table(Path("whole.parquet"), deepmath(2000)).read_bytes()
    Path("cut.parquet").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"cut\.parquet: not a parquet file, or a truncated one"):
        run("deepmath", "data=cut.parquet")
    Path("holes.parquet").write_bytes(whole[:100] + b"\0" * 3000 + whole[3100:])
    with pytest.raises(UserError, match=r"holes\.parquet: cannot be read to its end"):
        run("deepmath", "data=holes.parquet")
    Path("a.xml").touch()
    with pytest.raises(UserError, match=r"data: a\.xml: cannot be read; known files are \.parquet, \.jsonl,"):
        run("deepmath", "data=a.xml")
    Path("empty").mkdir()
    with pytest.raises(UserError, match="empty: it has neither"):
        run("deepmath", "data=empty")
    table(Path("rl/mmk12_train.parquet"), deepmath(1))
    with pytest.raises(UserError, match="subset: no file of rl has a name that begins with 'tqa'"):
        run("openmmreasoner", "data=rl", "subset=tqa")
