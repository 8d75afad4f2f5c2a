"""WebDataset tars of other tools as data: members by extension; damaged rows are counted, damaged tars are refused."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from odd_rows import Members, member
from PIL import Image

from mmopd.errors import DataError
from mmopd.prompts import foreign_tar
from mmopd.prompts.index import index_tar
from mmopd.prompts.prepare import Count, prepare
from mmopd.prompts.shards import Shards

GENERIC = Path(__file__).parents[1] / "data" / "generic.py"
LABELLED = ("images=image", "answer=cls", "ask=Which digit?")
ASKED = ("images=image", "answer=txt", "question=json.question", "number=key")


def picture(form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 0, 0)).save(file, form)
    return file.getvalue()


PNG, JPEG = picture(), picture("JPEG")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("tars").mkdir()
    return tmp_path


def write(members: Members, name: str = "tars/0.tar") -> Path:
    with tarfile.open(name, "w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return Path(name)


def made(*settings: str, data: str = "tars") -> tuple[Shards, Count]:
    shutil.rmtree("out", ignore_errors=True)
    return prepare(GENERIC, Path("out"), [f"data={data}", "task=digit_sum", *settings], max_bad=1.0)


def asked(question: Any) -> bytes:
    return json.dumps({"question": question}).encode()


def test_images_with_classes_texts_and_json() -> None:
    write([member("a/1.cls", b"7\n"), member("a/1.jpg", JPEG), member("a/2.png", PNG), member("a/2.cls", b"8")])
    write([member("3.JPEG", JPEG), member("3.cls", b"9")], "tars/1.tar")
    shards, count = made(*LABELLED)
    assert [(row.answer, row.images) for row in shards] == [("7", (JPEG,)), ("8", (PNG,)), ("9", (JPEG,))]
    write([member("b.d/1.json", asked("How many?")), member("b.d/1.txt", b"\xef\xbb\xbf5"), member("b.d/1.webp", PNG)])
    shards, count = made(*ASKED, data="tars/0.tar")
    assert (shards[0].answer, shards[0].messages[0]["content"][1]["text"]) == ("5", "How many?")
    assert (count.examples, count.left_out) == (1, {})


def test_several_images_and_members_with_longer_extensions() -> None:
    rows = [
        member("1.left.png", PNG),
        member("1.right.jpg", JPEG),
        member("1.cls", b"7"),
        member("1.npy", b"\x93NUMPY"),
    ]
    write([member("notes", type=tarfile.DIRTYPE), *rows, member("._1.png", b"Mac OS X")])
    (only,) = made(*LABELLED)[0]
    assert only.images == (PNG, JPEG)
    assert made("images=right.jpg", "answer=cls", "ask=Which?")[0][0].images == (JPEG,)


def test_a_folder_with_tars_is_read_as_tars_and_by_splits() -> None:
    write([member("1.png", PNG), member("1.cls", b"1")], "tars/train-0.tar")
    write([member("1.png", PNG), member("1.cls", b"2")], "tars/val-0.tar")
    Path("tars/0.json").write_text("{}", encoding="utf-8")
    assert [row.answer for row in made(*LABELLED)[0]] == ["1"]
    assert [row.answer for row in made(*LABELLED, "split=val")[0]] == ["2"]


def row(key: str, **changes: tuple[str, bytes] | None) -> Members:
    """Return the members of a good row, with some of them changed or left out."""
    whole = {"json": (f"{key}.json", asked("How many?")), "png": (f"{key}.png", PNG), "txt": (f"{key}.txt", b"5")}
    return [member(*one) for one in (whole | changes).values() if one]


def test_damaged_rows_are_counted_by_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign_tar, "MAX_IMAGE", 10_000)
    monkeypatch.setattr(foreign_tar, "MAX_TEXT", 200_000)
    monkeypatch.setattr(foreign_tar, "MAX_MEMBERS", 9)
    damaged: dict[str, list[Members]] = {
        "no image": [row("a", png=None)],
        "no txt": [row("b", txt=None), row("c", txt=("c.txt", b" "))],
        "no json.question": [row("d", json=None), row("e", json=("e.json", b"{}")), row("f", json=("f.json", b"[1]"))],
        "not JSON": [row("g", json=("g.json", b"{")), row("h", json=("h.json", b"[" * 100_000))],
        "not UTF-8": [row("i", txt=("i.txt", b"\xff")), row("j", json=("j.json", b'{"question": "\xe9"}'))],
        "bad image": [row("k", png=("k.png", PNG[:60])), row("l", png=("l.png", b"no image"))],
        "row too long": [
            row("m", png=("m.png", PNG + bytes(10_000))),
            row("n", txt=("n.txt", b"5" * 200_001)),
            [*row("o"), *(member(f"o.{i}.txt", b"5") for i in range(9))],
        ],
        "no plain file": [
            [*row("p", png=None), member("p.png", type=tarfile.SYMTYPE, linkname="/etc/passwd")],
            [*row("q", png=None), member("q.png", type=tarfile.LNKTYPE, linkname="a.png")],
            [*row("r", txt=None), member("r.txt", type=tarfile.FIFOTYPE)],
            [*row("s", txt=None), member("s.txt", type=tarfile.CHRTYPE)],
        ],
        "member twice": [[*row("t"), member("t.png", PNG)]],
        "no row": [[member("README", b"?")], [member(".png", PNG)], [member("x/u.", PNG)]],
        "key judges nothing": [row("v", txt=("v.txt", b"five"))],
        "duplicate key": [[*row("1"), *row("w/1"), *row("1", txt=("1.txt", b"6"))][-3:]],
    }
    write([*row("0"), *row("1"), *(one for some in damaged.values() for members in some for one in members), *row("2")])
    shards, count = made(*ASKED)
    assert [one.answer for one in shards] == ["5"] * 3
    assert count.left_out == {cause: len(some) for cause, some in damaged.items()}


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_a_tar_that_was_cut_is_refused_by_name(keep: float) -> None:
    path = write([one for i in range(20) for one in row(f"{i}")])
    content = path.read_bytes().rstrip(b"\0")
    for length in (int(len(content) * keep), int(len(content) * keep) // 512 * 512):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=r"tars/0\.tar: not a tar, a compressed one"):
            made(*ASKED)


def test_what_is_no_tar_is_refused_by_name() -> None:
    path = write(row("0"))
    whole = path.read_bytes()
    broken = whole.replace(b"0.png\0", b"0!png\0", 1)  # its header no longer has its checksum
    for content in (b"", b"text" * 1000, b"\x1f\x8b" + bytes(1000), broken):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"tars/0\.tar: not a tar"):
            made(*ASKED)


@pytest.mark.parametrize("size", [1 << 33, -512])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
def test_a_header_with_any_size_is_neither_read_into_memory_nor_followed_for_ever(kind: bytes, size: int) -> None:
    info = tarfile.TarInfo("0.png")
    info.type, info.size = kind, size
    path = Path("tars/0.tar")
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240))
    with path.open("r+b") as file:
        file.truncate(max(0, size) + 20_480)  # a hole
    with pytest.raises(DataError, match=r"tars/0\.tar: not a tar|1 x row too long"):
        made(*LABELLED)
    with pytest.raises(DataError, match=r"tars/0\.tar"):
        index_tar(path)
