"""Shards: mmopd and the webdataset library read back what was written, and a damaged shard is refused by name."""

import hashlib
import io
import json
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from mmopd.config import Mixture, Source
from mmopd.errors import UserError
from mmopd.prompts import Shards, index_tar, open_mixture, write_shards
from mmopd.prompts.index import index_path
from mmopd.records import Prompt
from mmopd.task.base import user_turn


def picture(seed: int, size: tuple[int, int] = (64, 32), form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=form)
    return file.getvalue()


def text_row(i: int) -> Prompt:
    return Prompt(f"t{i}", "additions", "text", tuple(user_turn(f"What is {i}+1? ¿größe?", 0)), (), str(i + 1))


def image_row(i: int, images: int = 1) -> Prompt:
    files = tuple(picture(100 * i + k, (32 + k, 16 + i), "JPEG" if k % 2 else "PNG") for k in range(images))
    return Prompt(f"i{i}", "digit_sum", "image", tuple(user_turn("Their sum?", images)), files, str(i))


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[list[Prompt], Path]:
    rows = [image_row(i, images=1 + 11 * (i == 3)) if i % 3 == 0 else text_row(i) for i in range(25)]
    write_shards(rows, tmp_path / "mixed", max_rows=10)
    return rows, tmp_path / "mixed"


def without_key(row: Prompt) -> tuple[object, ...]:
    return row.task, row.modality, row.messages, row.images, row.answer


def test_rows_come_back_by_number_as_they_were_written(mixed: tuple[list[Prompt], Path]) -> None:
    rows, folder = mixed
    shards = Shards(folder, "world")
    assert [path.name for path in sorted(folder.glob("*.tar"))] == [f"shard-{i:05d}-of-00003.tar" for i in range(3)]
    assert len(shards) == 25
    for i in np.random.default_rng(0).permutation(25):
        assert without_key(shards[int(i)]) == without_key(rows[i])
        assert shards[int(i)].key == f"world/{i}"
    assert [without_key(row) for row in shards] == [without_key(row) for row in rows]


def test_the_index_alone_knows_image_sizes_and_kinds(mixed: tuple[list[Prompt], Path]) -> None:
    rows, folder = mixed
    shards = Shards(folder)
    for i, row in enumerate(rows):
        assert shards.image_sizes(i) == [Image.open(io.BytesIO(data)).size for data in row.images]
    assert shards.kinds == Counter({("additions", "text"): 16, ("digit_sum", "image"): 9})


def test_the_webdataset_library_reads_the_same_rows(mixed: tuple[list[Prompt], Path]) -> None:
    rows, folder = mixed
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    read = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in read] == [f"{i:08d}" for i in range(25)]
    for sample, row in zip(read, rows, strict=True):
        data = json.loads(sample["json"])
        assert (data["id"], data["answer"], tuple(data["messages"])) == (row.key, row.answer, row.messages)
        images = {int(name.split(".")[0]): content for name, content in sample.items() if name[0].isdigit()}
        assert tuple(images[k] for k in sorted(images)) == row.images


def test_a_tar_that_webdataset_wrote_is_read_once_it_is_indexed(tmp_path: Path) -> None:
    tar = tmp_path / "theirs.tar"
    with webdataset.TarWriter(str(tar)) as writer:
        for i in range(3):
            fields = {"task": "digit_sum", "modality": "image", "messages": list(user_turn("?", 1)), "answer": str(i)}
            writer.write({"__key__": f"some.folder/row{i}", "json": fields, "0.png": np.full((8, 8, 3), i / 3)})
    with pytest.raises(UserError, match=r"theirs\.index\.safetensors: .* has no index; make it with `mmopd index "):
        Shards(tmp_path)
    index_tar(tar)
    assert [row.answer for row in Shards(tmp_path)] == ["0", "1", "2"]
    assert Shards(tmp_path).image_sizes(2) == [(8, 8)]


def test_the_same_rows_give_the_same_bytes_and_any_change_another_fingerprint(tmp_path: Path) -> None:
    rows = [text_row(i) for i in range(5)]
    first = write_shards(rows, tmp_path / "a")
    second = write_shards(rows, tmp_path / "b")
    third = write_shards([*rows[:4], text_row(99)], tmp_path / "c")
    assert first.fingerprint == second.fingerprint != third.fingerprint
    assert (tmp_path / "a/shard-00000-of-00001.tar").read_bytes() == (
        tmp_path / "b/shard-00000-of-00001.tar"
    ).read_bytes()


def test_the_bytes_of_a_shard_never_change(tmp_path: Path) -> None:
    write_shards([text_row(i) for i in range(5)], tmp_path / "s")
    digest = hashlib.sha256((tmp_path / "s/shard-00000-of-00001.tar").read_bytes()).hexdigest()
    assert digest == "110991cb4c0c4573d812fa372315405866f87573afee4b5834ba1c1e91f39dd8"


def test_a_shard_is_closed_at_its_bytes(tmp_path: Path) -> None:
    write_shards([image_row(i, images=4) for i in range(6)], tmp_path / "s", max_bytes=15_000)
    assert len(list((tmp_path / "s").glob("*.tar"))) > 1
    assert len(Shards(tmp_path / "s")) == 6


def test_threads_and_other_processes_read_the_same(mixed: tuple[list[Prompt], Path]) -> None:
    rows, folder = mixed
    shards = pickle.loads(pickle.dumps(Shards(folder)))
    with ThreadPoolExecutor(8) as threads:
        read = list(threads.map(lambda i: shards[i % 25].answer, range(500)))
    assert read == [rows[i % 25].answer for i in range(500)]


def test_rows_out_of_range_are_index_errors(mixed: tuple[list[Prompt], Path]) -> None:
    shards = Shards(mixed[1])
    for row in (-1, 25):
        with pytest.raises(IndexError, match="of 25"):
            shards[row]


def only_tar(folder: Path) -> Path:
    return sorted(folder.glob("*.tar"))[0]


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        Shards(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows, in 0 shards"):
        Shards(tmp_path)


def test_a_missing_index_is_refused(mixed: tuple[list[Prompt], Path]) -> None:
    index_path(only_tar(mixed[1])).unlink()
    with pytest.raises(UserError, match=r"shard-00000-of-00003\.index\.safetensors: .* has no index"):
        Shards(mixed[1])


def test_a_missing_tar_is_refused(mixed: tuple[list[Prompt], Path]) -> None:
    only_tar(mixed[1]).unlink()
    with pytest.raises(UserError, match=r"shard-00000-of-00003\.tar: this shard is missing"):
        Shards(mixed[1])


def test_a_shard_that_is_missing_with_its_index_is_refused(mixed: tuple[list[Prompt], Path]) -> None:
    tar = only_tar(mixed[1])
    index_path(tar).unlink()
    tar.unlink()
    with pytest.raises(UserError, match="2 shards, but their names say there are 3"):
        Shards(mixed[1])


def test_a_truncated_tar_is_refused_when_it_is_opened(mixed: tuple[list[Prompt], Path]) -> None:
    tar = only_tar(mixed[1])
    tar.chmod(0o644)
    tar.write_bytes(tar.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"shard-00000-of-00003\.tar: \d+ bytes, and its index says"):
        Shards(mixed[1])


def test_a_tar_that_is_cut_while_in_use_is_an_error_that_names_it(mixed: tuple[list[Prompt], Path]) -> None:
    shards, tar = Shards(mixed[1]), only_tar(mixed[1])
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(UserError, match=r"shard-00000-of-00003\.tar: row 5 cannot be read"):
        shards[5]


def test_content_of_the_same_size_but_another_hash_is_refused_by_verify(mixed: tuple[list[Prompt], Path]) -> None:
    tar = only_tar(mixed[1])
    tar.write_bytes(tar.read_bytes().replace(b"What is 1+1", b"What is 9+9"))
    with pytest.raises(UserError, match=r"shard-00000-of-00003\.tar: its content is not what"):
        Shards(mixed[1]).verify()


def header(index: bytes) -> bytes:
    return index[: 8 + int.from_bytes(index[:8], "little")]


@pytest.mark.parametrize(
    "broken",
    [
        lambda index: b"",
        lambda index: b"not an index",
        lambda index: b"\xff" * 100,
        lambda index: index[:50],
        lambda index: index[:-8],
        header,
        lambda index: index.replace(b'"offsets"', b'"offzets"'),
    ],
)
def test_an_index_that_is_none_is_refused(mixed: tuple[list[Prompt], Path], broken: Callable[[bytes], bytes]) -> None:
    path = index_path(only_tar(mixed[1]))
    assert broken(path.read_bytes()) != path.read_bytes()
    path.write_bytes(broken(path.read_bytes()))
    with pytest.raises(UserError, match=r"shard-00000-of-00003\.index\.safetensors: not an index"):
        Shards(mixed[1])


def test_an_index_of_another_version_says_what_to_do(mixed: tuple[list[Prompt], Path]) -> None:
    path = index_path(only_tar(mixed[1]))
    path.write_bytes(path.read_bytes().replace(b'\\"version\\": 3', b'\\"version\\": 2'))
    with pytest.raises(UserError, match="an index of version 2; make it again with `mmopd index "):
        Shards(mixed[1])


def test_an_index_of_version_1_says_what_to_do(mixed: tuple[list[Prompt], Path]) -> None:
    path = index_path(only_tar(mixed[1]))
    path.rename(path.with_name(path.name.replace(".safetensors", ".json")))
    with pytest.raises(
        UserError,
        match=r"shard-00000-of-00003\.index\.json: an index of version 1; write the source again, or run `mmopd index",
    ):
        Shards(mixed[1])
    index_tar(only_tar(mixed[1]))
    assert len(Shards(mixed[1])) == 25
    assert not list(mixed[1].glob("*.json"))


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


ROW = json.dumps({"task": "t", "modality": "image", "messages": list(user_turn("?", 1)), "answer": "1"}).encode()


TEXT = json.dumps({"task": "t", "modality": "text", "messages": list(user_turn("?", 0)), "answer": "1"}).encode()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.0.png", picture(0))], "row 'a'.*one json"),
        ([("a.json", b"{")], "row 'a'"),
        ([("a.json", b'{"task": "t"}')], "row 'a'.*no 'modality'"),
        ([("a.json", ROW.replace(b'"1"', b"1"))], "row 'a'.*1 as 'answer'"),
        ([("a.json", ROW), ("a.0.png", b"no image")], "row 'a'.*not an image"),
        ([("a.json", ROW), ("a.1.png", picture(0))], "row 'a'.*images from 0 on"),
        ([("a.json", ROW), ("a.mp3", b"")], r"row 'a'.*'a\.mp3'"),
        ([("a.json", TEXT), ("b.json", TEXT), ("a.json", TEXT)], "key 'a' occurs twice"),
        ([("a.json", ROW), ("a.json", ROW)], "occurs twice"),
        ([("README", b"")], "'README' has no extension; a row has KEY.json, "),
    ],
)
def test_a_tar_with_a_bad_row_gets_no_index(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    tar = make_tar(tmp_path / "bad.tar", members)
    with pytest.raises(UserError, match=rf"bad\.tar: .*{message}"):
        index_tar(tar)
    assert not index_path(tar).exists()


def test_no_tar_and_half_a_tar_get_no_index(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "half.tar", [("a.json", ROW), ("a.0.png", picture(0, (200, 200)))])
    for content in (b"", b"something else" * 100, tar.read_bytes()[:1700], tar.read_bytes()[:50_000]):
        tar.write_bytes(content)
        with pytest.raises(UserError, match=r"half\.tar: "):
            index_tar(tar)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Prompt("k", "t", "text", (), (), "1"), r"row 1 \(k\): it has no messages"),
        (
            Prompt("k", "t", "image", tuple(user_turn("?", 2)), (picture(0),), "1"),
            "2 image parts in its messages, and 1 images",
        ),
        (
            Prompt("k", "t", "text", tuple(user_turn("?", 1)), (picture(0),), "1"),
            "1 images, and its modality is 'text'",
        ),
        (Prompt("k", "t", "image", tuple(user_turn("?", 0)), (), "1"), "0 images, and its modality is 'image'"),
        (Prompt("k", "t", "image", tuple(user_turn("?", 1)), (b"GIF89a",), "1"), "image 0: not an image"),
        (
            Prompt("k", "t", "image", tuple(user_turn("?", 1)), (picture(0, (20_001, 1)),), "1"),
            "image 0: image of 20001 x 1",
        ),
        (Prompt("k", "t", "text", tuple(user_turn("?", 0)), (), 5), "5 as 'answer'"),  # type: ignore[arg-type]
        (Prompt("k", "t", "text", tuple(user_turn(" \n", 0)), (), "1"), "no text in its messages"),
        (Prompt("k", "t", "text", tuple(user_turn("?" * 1_000_001, 0)), (), "1"), r"1,000,\d+ characters of text"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_left_behind(tmp_path: Path, row: Prompt, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_shards([text_row(0), row], tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_no_rows_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows to write"):
        write_shards([], tmp_path / "s")
    write_shards([text_row(0)], tmp_path / "s")
    with pytest.raises(UserError, match="already there"):
        write_shards([text_row(1)], tmp_path / "s")
    assert Shards(tmp_path / "s")[0].answer == "1"


def test_the_rest_of_an_interrupted_call_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".s.partial").mkdir()
    (tmp_path / ".s.partial/00000.tar").write_bytes(b"half")
    write_shards([text_row(0)], tmp_path / "s")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_mixture_opens_by_name_and_its_task_must_fit(tmp_path: Path) -> None:
    write_shards([text_row(i) for i in range(3)], tmp_path / "shards/a")
    mixture = Mixture(sources={"sums": Source(shards=Path("shards/a"), task="additions")})
    opened = open_mixture(mixture, ["additions", "digit_sum"], tmp_path)
    assert opened["sums"][2].key == "sums/2"
    with pytest.raises(UserError, match=r"sources\.sums\.task: no task 'additions' .* did you mean 'addition'"):
        open_mixture(mixture, ["addition"], tmp_path)
    wrong = Mixture(sources={"sums": Source(shards=Path("shards/a"), task="digit_sum")})
    with pytest.raises(UserError, match=r"sources\.sums\.task: 'digit_sum', but .* has rows of task additions"):
        open_mixture(wrong, ["additions", "digit_sum"], tmp_path)
