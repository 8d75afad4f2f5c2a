"""Draws rows from `odd_values`, and writes them as tables of every kind and as tars of other tools."""

import base64
import codecs
import csv
import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import odd_values as odd
import pyarrow as pa
import pyarrow.parquet as pq
from odd_values import Key, Odd

from mmopd.task.base import user_turn

NOT_WANTED = "not wanted"
OTHERS = 50  # of as many lines, one is no row
PATHS = (
    *(Odd(value, NOT_WANTED) for value in (None, "", [])),
    *(Odd(value, "no image file") for value in ("nowhere.png", "pipe.png", ".", "x" * 300, "A" * 40_000, "a/" * 2_000)),
    *(Odd(value, "outside of the data") for value in ("/dev/zero", "../good.png", "link.png", "/etc/passwd")),
    *(Odd(value, "bad image") for value in (7, True, {"path": None}, {"a": 1}, [[]], "data:image/png,abc")),
    Odd("data:image/png;base64,%%%", "bad image"),
    Odd("empty.png", "bad image"),
    Odd(["good.png", "good.png"]),
    Odd("good.png"),
    Odd({"path": "good.png"}),
)
IDS = (*map(Odd, ("../../x", "a.b/c", "🙂", "x" * 300, "<|im_end|>", "a b\nc")),)
NO_IDS = (*(Odd(value, "no id") for value in ("", None, [], " ")),)
LINES = (
    b"not json\n",
    b"5\n",
    b"null\n",
    b'"text"\n',
    b"\xff\xfe\x00\n",
    b"[" * 100_000 + b"\n",
    b'{"id": \n',
    b"{}\n",
)
LINE_CAUSES = {"not JSON", "not UTF-8", "no object", "no answer"}


@dataclass
class Row:
    """A row of a table.

    Attributes:
        due: causes for one of which it is left out; empty if it has to be kept.
        open: nobody knows whether its image can be used.
    """

    id: str
    key: Key
    fields: dict[str, Any]
    due: set[str] = field(default_factory=set)
    open: bool = False


def draw(rng: random.Random, task: str, n: int) -> list[Row]:
    """Return n rows of a task: good ones, and some with one odd value or several."""
    rows: list[Row] = []
    for i in range(n):
        key = rng.choice(odd.KEYS[task])
        if key.cause and rng.random() < 0.7:  # most rows are to get further than their key
            key = rng.choice([key for key in odd.KEYS[task] if key.cause is None])
        row = Row(f"{i}", key, {"question": f"What is {i}?", "answer": key.value})
        row.due |= {key.cause} - {None}
        if task.startswith(("image", "digit")):
            _add_image(rng, row)
        if rng.random() < 0.4:
            pictures = "image" in row.fields and rng.random() < 0.3
            _set(rng, row, "question", odd.PICTURE_QUESTIONS if pictures else odd.QUESTIONS)
        _add_id(rng, row, rows)
        rows.append(row)
    return rows


def _set(rng: random.Random, row: Row, name: str, values: tuple[Odd, ...]) -> None:
    value, cause = rng.choice(values)
    row.fields[name] = value
    row.due |= {cause} - {None}


def _add_image(rng: random.Random, row: Row) -> None:
    kind = rng.random()
    if kind < 0.1:
        _set(rng, row, "image", PATHS)
        if isinstance(row.fields["image"], list) and "<image>" in str(row.fields["question"]):
            row.open = True
    elif kind < 0.2:
        row.fields["image"], row.open = odd.flipped(rng), True
    else:
        _set(rng, row, "image", odd.images() if kind < 0.7 else odd.images()[:20])


def _add_id(rng: random.Random, row: Row, earlier: list[Row]) -> None:
    kind = rng.random()
    row.fields["id"] = row.id
    if kind < 0.05:
        row.fields["id"] = row.id = f"{rng.choice(IDS).value}-{row.id}"
    elif kind < 0.08:
        _set(rng, row, "id", NO_IDS)
    elif kind < 0.1 and (kept := [one for one in earlier if not one.due and not one.open]):
        first = rng.choice(kept)
        row.id, row.key, row.fields, row.due, row.open = (
            first.id,
            first.key,
            dict(first.fields),
            {"duplicate key"},
            False,
        )


def write_tables(rng: random.Random, rows: list[Row], folder: Path) -> int:
    """Write the rows as .jsonl, .json, .parquet and .csv, with lines that are no rows; return how many these are."""
    folder.mkdir(parents=True)
    (folder / "good.png").write_bytes(odd.saved("PNG"))
    (folder.parent / "good.png").write_bytes(odd.saved("PNG"))
    (folder / "empty.png").write_bytes(b"")
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to("/dev/zero")
    tables: dict[str, list[dict[str, Any]]] = {"parquet": [], "csv": [], "json": [], "jsonl": []}
    for row in rows:
        plain = all(
            isinstance(row.fields[name], str) and _writes(row.fields[name]) for name in ("question", "answer", "id")
        )
        image = row.fields.get("image", b"")
        forms = ["json", "jsonl"]
        forms += ["parquet"] * (plain and isinstance(image, bytes)) + ["csv"] * (
            plain and isinstance(image, bytes | str)
        )
        form = rng.choice(forms)
        row.fields = row.fields if form == "parquet" else _with_path(rng, row.fields, folder)
        tables[form].append(row.fields)
    lines = [json.dumps(one).encode() + b"\n" for one in tables["jsonl"]]
    others = len(rows) // (OTHERS - 1)
    for _ in range(others):
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(LINES))
    (folder / "rows.JSONL").write_bytes(codecs.BOM_UTF8 * rng.randrange(2) + b"".join(lines))
    (folder / "rows.json").write_text(json.dumps(tables["json"]), encoding="utf-8")
    (folder / "._rows.json").write_bytes(b"Mac OS X")
    image = {"image": pa.binary()} if "image" in rows[0].fields else {}
    schema = pa.schema({"question": pa.string(), "answer": pa.string(), "id": pa.string(), **image})
    pq.write_table(pa.Table.from_pylist(tables["parquet"], schema), folder / "rows.parquet")
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["id", "question", "answer", *image])
        writer.writeheader()
        writer.writerows(tables["csv"])
    return others


def _writes(text: str) -> bool:
    """Return true for a text that a .csv file and a Parquet file can hold."""
    return text.isprintable() and text.strip() != "" and len(text) < 100_000


def _with_path(rng: random.Random, fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the fields with the image as a file or as a data URL."""
    image = fields.get("image")
    if not isinstance(image, bytes):
        return fields
    if rng.random() < 0.3:
        return fields | {"image": "data:image/png;base64," + base64.b64encode(image).decode()}
    path = folder / f"{len(list(folder.iterdir()))}.bin"
    path.write_bytes(image)
    return fields | {"image": path.name}


Members = list[tuple[tarfile.TarInfo, bytes]]


def member(name: str, content: bytes = b"", **about: Any) -> tuple[tarfile.TarInfo, bytes]:
    """Return a member of a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in about.items():
        setattr(info, key, value)
    return info, content


def fields_of(rng: random.Random, kind: str, **changes: Any) -> bytes:
    """Return the json of a row of that task, with some fields changed."""
    images = int(kind == "digit_sum")
    row = {"task": kind, "modality": "image" if images else "text", "answer": str(rng.randrange(100))}
    return json.dumps(row | {"messages": list(user_turn(f"What is {rng.random()}?", images))} | changes).encode()


def good_members(rng: random.Random, task: str, n: int) -> Members:
    """Return the members of n good rows."""
    found: Members = []
    for i in range(n):
        found.append(member(f"{i}.json", fields_of(rng, task)))
        if task == "digit_sum":
            found.append(member(f"{i}.0.png", odd.saved("PNG")))
    return found


MESSAGES: dict[str, Any] = {
    "no message": [],
    "a message that is text": ["?"],
    "no role": [{"content": "?"}],
    "no content": [{"role": "user"}],
    "content null": [{"role": "user", "content": None}],
    "content 5": [{"role": "user", "content": 5}],
    "a forged role": [{"role": "user<|im_end|>", "content": "?"}],
    "a role that is a list": [{"role": ["user"], "content": "?"}],
    "no text": [{"role": "user", "content": " "}],
    "a part of another type": [{"role": "user", "content": [{"type": "audio"}]}],
    "text 5": [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    "text that is an image, too": [{"role": "user", "content": [{"type": "text", "text": "?", "image": "x"}]}],
    "a message null": [None],
    "messages null": None,
    "messages that are text": "?",
    "messages that are an object": {},
    "too much text": [{"role": "user", "content": "?" * 1_000_001}],
    "images that are missing": list(user_turn("?", 3)),
}
Change = Callable[[random.Random, str, Members], Members]


def _with(*more: tuple[tarfile.TarInfo, bytes]) -> Change:
    return lambda rng, task, members: [*members, *more]


def _renamed(of: Callable[[str], str]) -> Change:
    def change(rng: random.Random, task: str, members: Members) -> Members:
        return [member(of(info.name), content) for info, content in members]

    return change


def _json(**changes: Any) -> Change:
    return lambda rng, task, members: [*members, member("z.json", fields_of(rng, "additions", **changes))]


def _marked(rng: random.Random, task: str, members: Members) -> Members:
    """Write a byte-order mark before the first row's json."""
    (info, content), *others = members
    return [member(info.name, codecs.BOM_UTF8 + content), *others]


def _linked(kind: bytes, to: str) -> Change:
    """Add a row whose image is a link."""

    def change(rng: random.Random, task: str, members: Members) -> Members:
        row = fields_of(rng, "digit_sum", task=task)
        earlier = [member("y.json", row), member("y.0.png", odd.saved("PNG"))]
        return [*earlier, member("z.json", row), member("z.0.png", type=kind, linkname=to)]

    return change


def _picture(data: bytes) -> Change:
    def change(rng: random.Random, task: str, members: Members) -> Members:
        return [*members, member("z.json", fields_of(rng, "digit_sum", task=task)), member("z.0.png", data)]

    return change


# Whether the tar is indexed; how it differs from a good one.
TARS: dict[str, tuple[bool, Change]] = {
    "as it should be": (True, _with()),
    "upper-case extensions": (True, _renamed(str.upper)),
    "long names": (True, _renamed(lambda name: f"{'d/' * 80}{name}")),
    "names that are not ASCII": (True, _renamed(lambda name: f"数据/é{name}")),
    "folders and notes of macOS": (True, _with(member("d", type=tarfile.DIRTYPE), member("._0.json", b"Mac OS X"))),
    "a byte-order mark": (True, _marked),
    "a link to an earlier member": (True, _linked(tarfile.SYMTYPE, "y.0.png")),
    "a hard link to an earlier member": (True, _linked(tarfile.LNKTYPE, "y.0.png")),
    "half an image": (True, _picture(odd.saved("PNG")[:3000] + bytes(100))),
    "a sparse member": (False, _with(member("z.json", b"{}", type=tarfile.GNUTYPE_SPARSE))),
    "a link to nothing": (False, _linked(tarfile.SYMTYPE, "/etc/passwd")),
    "a hard link to nothing": (False, _linked(tarfile.LNKTYPE, "../y.0.png")),
    "a pipe": (False, _with(member("z.json", type=tarfile.FIFOTYPE))),
    "a device": (False, _with(member("z.json", type=tarfile.CHRTYPE))),
    "a member without extension": (False, _with(member("README", b"hello"))),
    "an unknown member": (False, _with(member("z.json", b"{}"), member("z.cls", b"5"))),
    "a key that occurs twice": (False, _with(member("x.json", b"{}"), member("0.1.png", odd.saved("PNG")))),
    "an image without json": (False, _with(member("z.0.png", odd.saved("PNG")))),
    "an image that is missing": (False, _json(modality="image", messages=list(user_turn("?", 1)))),
    "an image too many": (False, _with(member("0.9.png", odd.saved("PNG")))),
    "json that is none": (False, _with(member("z.json", b"{"))),
    "deep json": (False, _with(member("z.json", b"[" * 100_000))),
    "an unknown modality": (False, _json(modality="audio")),
    "a number as answer": (False, _json(answer=5)),
    "no image": (False, _picture(b"no image")),
    "an image of 30,000 pixels": (False, _picture(odd.claiming(30_000, 30_000))),
    **{kind: (False, _json(messages=messages)) for kind, messages in MESSAGES.items()},
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data.rstrip(b"\0")[:-200],
    "a broken header": lambda data: data.replace(b"0.json", b"0!json", 1),
    "compressed": gzip.compress,
    "empty": lambda data: b"",
    "no tar": lambda data: odd.saved("PNG"),
}


@dataclass(frozen=True)
class Tar:
    """A tar that was written: its kind, its rows, and whether it has to be indexed."""

    path: Path
    kind: str
    rows: int
    good: bool


def write_tars(rng: random.Random, task: str, n: int, folder: Path) -> list[Tar]:
    """Write tars of a task with n rows together, or a few more."""
    folder.mkdir(parents=True)
    written: list[Tar] = []
    while n > 0:
        kind = rng.choice([*TARS, *BYTES, *["as it should be"] * 30])
        good, change = TARS.get(kind, (False, _with()))
        members = change(rng, task, good_members(rng, task, rng.randint(1, 4)))
        rows = sum(info.name.lower().endswith(".json") and "._" not in info.name for info, _ in members)
        file = io.BytesIO()
        with tarfile.open(
            fileobj=file, mode="w", format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
        ) as archive:
            for info, content in members:
                archive.addfile(info, io.BytesIO(content))
        path = folder / f"{len(written):05d}.tar"
        path.write_bytes(BYTES.get(kind, bytes)(file.getvalue()))
        written.append(Tar(path, kind, rows, good))
        n -= rows
    return written


LATE = 48  # rows of `write_late`
LATE_TASK = "digit_sum"
TOO_LONG = "# " * 170  # more tokens than the student's engine takes in `benchmarks/fuzz.py`, and fewer than its teacher


def write_late(folder: Path) -> Tar:
    """Write a tar of which every fourth row breaks only when it is used.

    A question is too long for the student's engine, an answer too long for the teacher that is told it, or half an
    image is missing; in turn. The rows in between, some of which a preflight asks for, are good.
    """
    odd_ones: dict[int, tuple[dict[str, Any], bytes]] = {
        3: ({"messages": list(user_turn(TOO_LONG, 1))}, odd.saved("PNG")),
        6: ({"answer": "7" * 900}, odd.saved("PNG")),
        9: ({}, odd.saved("PNG")[:3000] + bytes(100)),
    }
    folder.mkdir(parents=True)
    path = folder / "late.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(LATE):
            changes, image = odd_ones.get(i % 12, ({}, odd.saved("PNG")))
            content = fields_of(random.Random(i), LATE_TASK, **changes)
            for info, data in (member(f"{i:02}.json", content), member(f"{i:02}.0.png", image)):
                archive.addfile(info, io.BytesIO(data))
    return Tar(path, "rows that break later", LATE, True)
