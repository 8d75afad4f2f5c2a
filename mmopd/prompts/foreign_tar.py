"""Rows of a WebDataset tar that another tool wrote for its own use: the members `KEY.jpg`, `KEY.json`, `KEY.txt`, ...

Members are read in order and never extracted. A member that cannot be used makes its row a bad one.
"""

import json
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmopd.errors import DataError
from mmopd.modality.pixels import FORMATS
from mmopd.prompts.archive import Bounded, check_end, check_regular
from mmopd.prompts.tables import Bad, Examples

PICTURES = frozenset({*FORMATS.values(), "jpeg", "tif"})
TEXTS = frozenset({"txt", "text", "cls", "caption"})
MAX_IMAGE = 1 << 26  # bytes
MAX_TEXT = 1 << 25  # bytes
MAX_ROW = 1 << 28  # bytes of all members of a row
MAX_MEMBERS = 1_000  # of a row


def tar_rows(path: Path) -> Examples:
    """Return the rows of a tar as examples.

    Their columns are `key`, each member by its extension (`txt` and `cls` as text, `json` parsed, `jpg` as bytes), and
    `image`: the images in their order.

    Raises:
        DataError: it is no file.
    """
    check_regular(path)
    return Examples(lambda: _rows(path), 0)


class _Row:
    """The members of one key."""

    def __init__(self, key: str) -> None:
        self.key = key
        self._fields: dict[str, Any] = {"key": key}
        self._images = list[bytes]()
        self._bad: Bad | None = None
        self._members = self._size = 0

    def add(self, archive: tarfile.TarFile, info: tarfile.TarInfo, extension: str) -> None:
        """Read a member; it makes the row bad if it cannot be used."""
        self._members += 1
        kind = extension.rpartition(".")[2]
        if self._bad is None:
            self._bad = self._fault(info, extension, kind)
        if self._bad is not None or kind not in PICTURES | TEXTS | {"json"}:
            return
        self._size += info.size
        file = archive.extractfile(info)
        assert file is not None  # a regular file has content
        content = file.read(info.size)
        if kind in PICTURES:
            self._images.append(content)
            self._fields[extension] = content
            return
        try:
            text = content.decode("utf-8-sig")
            self._fields[extension] = json.loads(text) if kind == "json" else text.strip()
        except UnicodeDecodeError as error:
            self._bad = Bad("not UTF-8", f"{info.name}: {error}")
        except (ValueError, RecursionError) as error:
            self._bad = Bad("not JSON", f"{info.name}: {error}")

    def _fault(self, info: tarfile.TarInfo, extension: str, kind: str) -> Bad | None:
        limit = MAX_IMAGE if kind in PICTURES else MAX_TEXT
        if not info.isreg() or info.issparse():
            way = "write the tar with --dereference --hard-dereference, and without --sparse"
            return Bad("no plain file", f"{info.name}: a link, a sparse file or a device; {way}")
        if extension in self._fields:
            return Bad("member twice", f"{info.name}: the row has another .{extension}")
        if kind in PICTURES | TEXTS | {"json"} and info.size > min(limit, MAX_ROW - self._size):
            return Bad("row too long", f"{info.name}: {info.size:,} bytes; at most {limit:,}, and {MAX_ROW:,} a row")
        if self._members > MAX_MEMBERS:
            return Bad("row too long", f"{info.name}: more than {MAX_MEMBERS:,} members of one key")
        return None

    def example(self) -> dict[str, Any] | Bad:
        """Return the row, or why it is bad."""
        if self._bad is not None:
            return self._bad
        return self._fields | ({"image": self._images} if self._images else {})


def _rows(path: Path) -> Iterator[dict[str, Any] | Bad]:
    row: _Row | None = None
    try:
        with Bounded(path) as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # it would keep each of them
                if info.size < 0:
                    raise tarfile.ReadError(f"the member {info.name!r} has {info.size} bytes")
                name = posixpath.basename(info.name)
                if info.isdir() or name.startswith("._"):  # macOS's notes about a file
                    continue
                stem, dot, extension = name.partition(".")
                if not dot or not stem or not extension:
                    yield Bad("no row", f"{path}: {info.name}: a row's member is KEY.EXTENSION")
                    continue
                key = posixpath.join(posixpath.dirname(info.name), stem)
                if row is None or row.key != key:
                    if row is not None:
                        yield row.example()
                    row = _Row(key)
                row.add(archive, info, extension.lower())
            check_end(path, archive.offset)
    except (tarfile.TarError, OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a tar, a compressed one (gunzip it), or a truncated one ({error})") from None
    if row is not None:
        yield row.example()
