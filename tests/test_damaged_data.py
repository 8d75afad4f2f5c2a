"""Random damage to a file of each format: every example becomes a row or is counted, or the file is refused by name."""

import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from odd_rows import member
from PIL import Image

from mmopd.errors import DataError
from mmopd.prompts.prepare import prepare

DATA = Path(__file__).parents[1] / "data"
ROUNDS = 30
ROWS = [{"id": f"{i}", "question": f"What is\n{i}+1, é?", "answer": f"{i + 1}", "image": "a.png"} for i in range(8)]


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    return file.getvalue()


def table(sign: str) -> bytes:
    lines = [sign.join(ROWS[0]), *(sign.join(f'"{value}"' for value in row.values()) for row in ROWS)]
    return "\n".join(lines).encode()


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for row in ROWS:
            for name, content in (
                ("png", picture()),
                ("txt", row["answer"].encode()),
                ("json", json.dumps(row).encode()),
            ):
                info, data = member(f"{row['id']}.{name}", content)
                archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def chats(parts: bool) -> bytes:
    def said(row: dict[str, str]) -> list[dict[str, object]]:
        if parts:
            content = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": row["question"]}]
            return [{"role": "user", "content": content}, {"role": "assistant", "content": row["answer"]}]
        return [{"from": "human", "value": "<image>" + row["question"]}, {"from": "gpt", "value": row["answer"]}]

    rows = [{"messages": said(row)} if parts else {"image": "a.png", "conversations": said(row)} for row in ROWS]
    return "\n".join(map(json.dumps, rows)).encode() if parts else json.dumps(rows).encode()


GENERIC = ("generic.py", ["images=image"])
FORMATS: dict[str, tuple[str, Callable[[], bytes], str, list[str]]] = {
    "csv": ("a.csv", lambda: table(","), *GENERIC),
    "tsv": ("a.tsv", lambda: table("\t"), *GENERIC),
    "utf-16": ("a.csv", lambda: ("\ufeff" + table(";").decode()).encode("utf-16-le"), *GENERIC),
    "json": ("a.json", lambda: json.dumps(ROWS).encode(), *GENERIC),
    "object": ("a.json", lambda: json.dumps({"data": ROWS}).encode(), *GENERIC),
    "jsonl": ("a.jsonl", lambda: "\n".join(map(json.dumps, ROWS)).encode(), *GENERIC),
    "parquet": ("a.parquet", parquet, *GENERIC),
    "tar": ("a.tar", tar, "generic.py", ["images=image", "question=json.question", "answer=txt", "number=key"]),
    "llava": ("a.json", lambda: chats(False), "chat.py", []),
    "openai": ("a.jsonl", lambda: chats(True), "chat.py", []),
}


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Return a content that is cut, or of which some bytes are changed, left out, doubled or moved."""
    for _ in range(rng.choice([1, 1, 2, 10])):
        at, to = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        piece = content[at : min(to, at + rng.choice([1, 1, 20, 600]))]
        other = rng.choice(
            [
                b"",
                piece * 2,
                piece[::-1],
                rng.randbytes(len(piece)),
                *[b'"', b"\0", b"\n", b"\xff", b"]", b",", b"{", b"9" * 30],
            ]
        )
        content = content[:at] + other + content[at + len(piece) :]
        if rng.random() < 0.1:
            content = content[: rng.randrange(len(content) + 1)]
        content = content or b" "
    return content


@pytest.mark.parametrize("form", FORMATS)
def test_any_damage_is_counted_or_named(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, make, converter, more = FORMATS[form]
    Path("a.png").write_bytes(picture())
    rng = random.Random(form)
    whole = make()
    refused = list[str]()
    settings = [f"data={name}", "task=digit_sum", *more]
    for number in range(ROUNDS + 1):
        Path(name).write_bytes(damaged(rng, whole) if number else whole)
        shutil.rmtree("out", ignore_errors=True)
        try:
            shards, count = prepare(DATA / converter, Path("out"), settings, max_bad=1.0)
        except DataError as error:
            refused.append(str(error))
            continue
        finally:
            shutil.rmtree(".out.partial", ignore_errors=True)
        assert count.examples == count.rows + count.not_wanted + sum(count.left_out.values())
        assert count.rows == len(shards)
        assert not {cause for cause in count.left_out if cause.endswith(("Error", "Exception"))}
        if not number:
            assert (count.rows, count.left_out) == (8, {})
    assert len(refused) < ROUNDS
    assert all(name in message or message.startswith("out: none of") for message in refused)
