"""Remote shards: the same rows as local ones, a bounded and correct local copy, and faults that are named."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from mmopd.config import Mixture
from mmopd.errors import UserError
from mmopd.prompts import Shards, open_mixture, write_shards
from mmopd.prompts.remote import Cache
from mmopd.prompts.shards import open_remote
from mmopd.records import Prompt
from mmopd.task.base import user_turn


class Quiet(SimpleHTTPRequestHandler):
    """Count the tars that are requested."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        if self.path.endswith(".tar"):
            self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """Return a folder of six shards."""
    rows = [
        Prompt(str(i), "additions", "text", tuple(user_turn(f"{i}+1?" + "!" * 3_000, 0)), (), str(i + 1))
        for i in range(30)
    ]
    write_shards(rows, tmp_path / "there", max_rows=5)
    return tmp_path / "there"


@pytest.fixture
def url(there: Path) -> Iterator[str]:
    Quiet.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(there.parent))) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/there"
        server.shutdown()


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def test_rows_are_those_of_the_folder_and_a_tar_is_copied_once(there: Path, url: str, tmp_path: Path) -> None:
    local, remote = Shards(there, "s"), open_remote(url, Cache(tmp_path / "cache", 1 << 30), "s")
    assert remote.fingerprint == local.fingerprint
    assert (remote.totals(), remote.kinds) == (local.totals(), local.kinds)
    assert Quiet.asked == []
    assert remote[7] == local[7]
    assert len(Quiet.asked) == 1
    assert [*remote, *remote] == [*local, *local]
    assert len(Quiet.asked) == 6
    remote.verify()


def test_copies_take_no_more_room_than_they_may_and_the_oldest_go_first(there: Path, url: str, tmp_path: Path) -> None:
    one = size(there) // 6
    cache = Cache(tmp_path / "cache", int(2.5 * one))
    remote = open_remote(url, cache)
    for row in (0, 5, 0, 10):  # shards 0, 1, 0, 2: shard 1 is the least recently used
        assert remote[row].answer == str(row + 1)
        assert size(cache.folder) <= cache.max_bytes
    before = len(Quiet.asked)
    assert remote[1].answer == "2"
    assert len(Quiet.asked) == before
    assert remote[6].answer == "7"
    assert len(Quiet.asked) == before + 1


def test_threads_that_want_the_same_shard_copy_it_once(url: str, tmp_path: Path) -> None:
    remote = open_remote(url, Cache(tmp_path / "cache", 1 << 30))
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda i: remote[i % 5].answer, range(40))) == [str(i % 5 + 1) for i in range(40)]
    assert len(Quiet.asked) == 1


def test_a_mixture_takes_urls_and_paths(there: Path, url: str, tmp_path: Path) -> None:
    sources = {"a": {"shards": url, "task": "additions"}, "b": {"shards": str(there), "task": "additions"}}
    opened = open_mixture(Mixture.model_validate({"sources": sources}), ["additions"], tmp_path)
    assert [row.answer for row in opened["a"]] == [row.answer for row in opened["b"]]
    assert len(list((tmp_path / ".mmopd/shards").glob("*.tar"))) == 6


def test_other_file_systems_of_fsspec_do(there: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in there.iterdir():
        memory.pipe_file(f"/bucket/there/{path.name}", path.read_bytes())
    remote = open_remote("memory://bucket/there/", Cache(tmp_path / "cache", 1 << 30))
    assert [row.answer for row in remote] == [str(i + 1) for i in range(30)]
    assert remote.name == "there"


def test_a_shard_that_is_not_what_was_indexed_is_refused(there: Path, url: str, tmp_path: Path) -> None:
    remote = open_remote(url, Cache(tmp_path / "cache", 1 << 30))
    tar = there / "shard-00000-of-00006.tar"
    content = tar.read_bytes()
    tar.chmod(0o644)
    for broken, message in (
        (content.replace(b'"answer":"1"', b'"answer":"9"'), "its content is not what"),
        (content[:-600], r"it ended after \d+ of \d+ bytes"),
        (content + b"more", "larger than the .* bytes in its index"),
    ):
        tar.write_bytes(broken)
        with pytest.raises(UserError, match=rf"{url}/shard-00000-of-00006\.tar: .*{message}"):
            remote[0]
        assert not list((tmp_path / "cache").glob("*.tar"))
        assert not list((tmp_path / "cache").glob(".*.tar.*"))
    assert remote[5].answer == "6"
    tar.write_bytes(content)
    assert remote[0].answer == "1"


def test_a_place_where_nothing_is_is_named(there: Path, url: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30)
    with pytest.raises(UserError, match=f"{url}/nowhere: the shards cannot be read: "):
        open_remote(f"{url}/nowhere", cache)
    (there.parent / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: it has no \*\.index\.safetensors files"):
        open_remote(url.replace("there", "empty"), cache)
    with pytest.raises(UserError, match="nosuch://x/y: the shards cannot be read: "):
        open_remote("nosuch://x/y", cache)
    remote = open_remote(url, cache)
    (there / "shard-00001-of-00006.tar").unlink()
    with pytest.raises(UserError, match=r"shard-00001-of-00006\.tar: the shard cannot be read: FileNotFoundError"):
        remote[5]


def test_a_shard_that_is_gone_there_is_gone_here_at_the_next_opening(there: Path, url: str, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30)
    open_remote(url, cache)
    for path in there.iterdir():
        path.unlink()
    there.rmdir()
    write_shards([Prompt("0", "additions", "text", tuple(user_turn("1+1?", 0)), (), "2")], there)
    assert [row.answer for row in open_remote(url, cache)] == ["2"]
