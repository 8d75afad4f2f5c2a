"""The index beside a tar: where each row's members lie, and what can be known without decoding anything.

`NAME.tar` has `NAME.index.json`. Filters, budgets and the plan read only the index; a row is one `pread`. The tar
itself is plain WebDataset: members `KEY.json`, `KEY.0.png`, `KEY.1.jpg`, ... in a row, with one key for each row.
"""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import base_plus_ext

from mmopd.errors import UserError
from mmopd.fingerprint import hash_file
from mmopd.modality.encode import open_image

VERSION = 1
FIELDS = ("task", "modality", "messages", "answer")  # of a row's json


def index_path(tar: Path) -> Path:
    """`NAME.index.json` of `NAME.tar`."""
    return tar.with_suffix(".index.json")


@dataclass(frozen=True, slots=True)
class Index:
    """The index of one tar of R rows, M members (one json and the images of each row, in order) and I images."""

    tar: Path
    size: int  # bytes of the tar
    sha256: str  # of the tar
    kinds: Counter[tuple[str, str]]  # (task, modality) -> rows
    first: NDArray[np.int64]  # [R + 1]: row r has members first[r] to first[r + 1]
    members: NDArray[np.int64]  # [M, 2]: offset and size in the tar, bytes
    images: NDArray[np.int32]  # [I, 2]: width and height, pixels

    def __len__(self) -> int:
        return len(self.first) - 1

    def row_members(self, row: int) -> list[tuple[int, int]]:
        """(offset, size) of the json and of each image of a row, in bytes."""
        return [(int(offset), int(size)) for offset, size in self.members[self.first[row] : self.first[row + 1]]]

    def row_images(self, row: int) -> list[tuple[int, int]]:
        """(width, height) of each image of a row, in pixels."""
        before = int(self.first[row]) - row  # each earlier row has one member that is no image
        return [(int(w), int(h)) for w, h in self.images[before : before + int(self.first[row + 1] - self.first[row]) - 1]]

    @classmethod
    def load(cls, tar: Path) -> Self:
        """Read the index beside `tar`, and compare the tar's size with it.

        Raises:
            UserError: the tar or its index is missing, the index does not read, or the tar has another size.
        """
        path = index_path(tar)
        if not tar.is_file():
            raise UserError(f"{tar}: this shard is missing, though its index is there; write the source again")
        try:
            data = json.loads(path.read_text())
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']}, and this is made for {VERSION}")
            index = cls(
                tar=tar,
                size=data["bytes"],
                sha256=data["sha256"],
                kinds=Counter({(task, modality): rows for task, modality, rows in data["kinds"]}),
                first=np.cumsum([0, *data["counts"]], dtype=np.int64),
                members=np.array(data["members"], dtype=np.int64).reshape(-1, 2),
                images=np.array(data["images"], dtype=np.int32).reshape(-1, 2),
            )
            if index.first[-1] != len(index.members) or len(index.images) + len(index) != len(index.members):
                raise ValueError("its counts do not add up")
        except FileNotFoundError:
            raise UserError(f"{path}: the shard {tar.name} has no index; make it with mmopd.prompts.index_tar") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not an index of a shard ({type(error).__name__}: {error}); write the source again") from None
        if (size := tar.stat().st_size) != index.size:
            raise UserError(f"{tar}: {size} bytes, and its index says {index.size}: truncated or replaced; write the source again")
        return index

    def verify(self) -> None:
        """Read the whole tar and compare its hash.

        Raises:
            UserError: the content is not what was indexed.
        """
        if hash_file(self.tar) != self.sha256:
            raise UserError(f"{self.tar}: its content is not what {index_path(self.tar).name} was made from; write the source again")


def index_tar(tar: Path) -> None:
    """Read a WebDataset tar and write its index beside it.

    Raises:
        UserError: no tar or a truncated one, a row without json, an unknown member, a key that occurs twice, or an image
            that cannot be opened or is too large; names the file and the row.
    """
    counts: list[int] = []
    members: list[tuple[int, int]] = []
    images: list[tuple[int, int]] = []
    kinds: Counter[tuple[str, str]] = Counter()
    for key, infos, contents in _rows(tar):
        try:
            row = parse_row(contents[0])
            images += [open_image(content).size for content in contents[1:]]
        except ValueError as error:
            raise UserError(f"{tar}: row {key!r}: {error}") from None
        kinds[row["task"], row["modality"]] += 1
        counts.append(len(infos))
        members += [(info.offset_data, info.size) for info in infos]
    data = {
        "version": VERSION,
        "tar": tar.name,
        "bytes": tar.stat().st_size,
        "sha256": hash_file(tar),
        "rows": len(counts),
        "kinds": [[*kind, rows] for kind, rows in sorted(kinds.items())],
        "counts": counts,
        "members": members,
        "images": images,
    }
    index_path(tar).write_text(json.dumps(data, separators=(",", ":")))


def parse_row(content: bytes) -> dict[str, Any]:
    """The fields of a row's json.

    Raises:
        ValueError: not json, or a field is missing or of another type.
    """
    row = json.loads(content)
    if not isinstance(row, dict):
        raise ValueError(f"its json is {type(row).__name__}, not an object")
    for field in FIELDS:
        if not isinstance(row.get(field), list if field == "messages" else str):
            raise ValueError(f"its json has {row[field]!r} as {field!r}" if field in row else f"its json has no {field!r}")
    return row


def _rows(tar: Path) -> Iterator[tuple[str, list[tarfile.TarInfo], list[bytes]]]:
    """(key, members, contents) of each row, its json first and its images by number."""
    seen: set[str] = set()
    try:
        with tarfile.open(tar, "r:") as archive:
            key, row = "", list[tuple[str, tarfile.TarInfo]]()
            for info in archive:
                if not info.isfile():
                    continue
                stem, extension = base_plus_ext(info.name)
                if stem is None:
                    raise UserError(f"{tar}: the member {info.name!r} has no extension")
                if stem != key:
                    if row:
                        yield _read(tar, archive, key, row)
                    if stem in seen:
                        raise UserError(f"{tar}: the key {stem!r} occurs twice")
                    seen.add(stem)
                    key, row = stem, []
                row.append((extension, info))
            if row:
                yield _read(tar, archive, key, row)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{tar}: not a tar, or a truncated one ({error})") from None


def _read(
    tar: Path, archive: tarfile.TarFile, key: str, row: list[tuple[str, tarfile.TarInfo]]
) -> tuple[str, list[tarfile.TarInfo], list[bytes]]:
    numbered: dict[int, tarfile.TarInfo] = {}
    for extension, info in row:
        image = re.fullmatch(r"(\d+)\.\w+", extension)
        place = -1 if extension == "json" else int(image[1]) if image else None
        if place is None or place in numbered:
            raise UserError(f"{tar}: row {key!r}: member {info.name!r} is neither KEY.json nor KEY.NUMBER.FORMAT, or occurs twice")
        numbered[place] = info
    if sorted(numbered) != list(range(-1, len(numbered) - 1)):
        names = [info.name for _, info in row]
        raise UserError(f"{tar}: row {key!r}: it has the members {names}; needed are one json, and images from 0 on")
    infos = [numbered[place] for place in sorted(numbered)]
    contents = [stream.read() if (stream := archive.extractfile(info)) else b"" for info in infos]
    if short := next((info.name for info, content in zip(infos, contents, strict=True) if len(content) != info.size), None):
        raise UserError(f"{tar}: truncated inside {short!r}")
    return key, infos, contents
