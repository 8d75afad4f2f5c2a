"""The index next to a tar: the positions of each row's members, and facts that need no decoding.

`NAME.tar` has `NAME.index.safetensors`. Filters, budgets and the plan read only the index; reading a row takes one
`pread` for each of its members. The tar itself is plain WebDataset (`mmopd.prompts.rows`): `KEY.json`, `KEY.0.png`,
`KEY.1.jpg`, ... one after the other, with one key for each row. Here files of other media count as images too, after
the row's own images.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mmopd.errors import DataError
from mmopd.modality.registry import MEDIA, shown_items
from mmopd.prompts.archive import check_regular, read_rows
from mmopd.prompts.rows import RowError, unpack
from mmopd.prompts.tokens import Counter
from mmopd.records import Prompt
from mmopd.runtime.fingerprint import hash_file

VERSION = 3
SUFFIX = ".index.safetensors"
OLD_SUFFIX = ".index.json"  # suffix of version 1


def index_path(tar: Path) -> Path:
    """Return `NAME.index.safetensors` for `NAME.tar`."""
    return tar.with_suffix(SUFFIX)


@dataclass(frozen=True, slots=True)
class Index:
    """The index of one tar of R rows, M members and I images.

    The members of a row are one json and its images, in order; files of other media count as images.
    """

    tar: Path
    size: int  # bytes of the tar
    sha256: str  # hash of the tar
    kinds: tuple[tuple[str, str], ...]  # (task, modality)
    kind: NDArray[np.int16]  # [R] position of the row's kind in `kinds`
    first: NDArray[np.int32]  # [R + 1]: row r has members first[r] to first[r + 1]
    offsets: NDArray[np.int64]  # [M] position in the tar, in bytes
    sizes: NDArray[np.int32]  # [M] bytes
    checksums: NDArray[np.uint32]  # [M] CRC-32 of the content
    images: NDArray[np.int32]  # [I, 2]: width and height in pixels, turned upright
    processor: str | None  # processor for which tokens were counted (`tokens.hash_processor`)
    text: NDArray[np.int32]  # [R] text tokens; [0] if not counted
    visual: NDArray[np.int32]  # [R] visual tokens of all images together; [0] if not counted

    def __len__(self) -> int:
        return len(self.first) - 1

    def image_counts(self) -> NDArray[np.int32]:
        """Return [R] images of each row."""
        counts: NDArray[np.int32] = np.diff(self.first) - 1
        return counts

    def row_images(self, row: int) -> list[tuple[int, int]]:
        """Return (width, height) of each image of a row, in pixels."""
        before = int(self.first[row]) - row  # each earlier row has one member that is not an image
        return [
            (w, h) for w, h in self.images[before : before + int(self.first[row + 1] - self.first[row]) - 1].tolist()
        ]

    def read(self, tar: Path, row: int) -> list[bytes]:
        """Read the json and the images of a row, from the tar or a copy of it.

        Raises:
            OSError: the file cannot be read.
            RowError: it ends inside the row, or the content is not what was indexed.
        """
        members = slice(self.first[row], self.first[row + 1])
        offsets = self.offsets[members].tolist()
        sizes = self.sizes[members].tolist()
        file = os.open(tar, os.O_RDONLY)
        try:
            contents = [os.pread(file, size, offset) for offset, size in zip(offsets, sizes, strict=True)]
        finally:
            os.close(file)
        if [len(content) for content in contents] != sizes:
            raise RowError("truncated", "the file ends inside the row")
        if list(map(crc32, contents)) != self.checksums[members].tolist():
            raise RowError("damaged", "its content is not what was indexed")
        return contents

    @classmethod
    def load(cls, tar: Path) -> Self:
        """Read the index next to `tar`, and compare the tar's size with it.

        Raises:
            DataError: the tar or its index is missing, the index does not read, or the tar has another size.
        """
        if not tar.is_file():
            raise DataError(f"{tar}: this shard is missing, though its index is there; write the source again")
        index = cls.load_alone(tar)
        if (size := tar.stat().st_size) != index.size:
            raise DataError(
                f"{tar}: {size} bytes, and its index says {index.size}: truncated or replaced; write the source again"
            )
        return index

    @classmethod
    def load_alone(cls, tar: Path) -> Self:
        """Read the index that belongs to `tar`; the tar itself may be elsewhere.

        Raises:
            DataError: the index is missing, of another version, or does not read.
        """
        path = index_path(tar)
        check_regular(path)
        try:
            content = path.read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            about = json.loads(header["__metadata__"]["index"])
            arrays = load(content)
            if about["version"] != VERSION:
                raise DataError(f"{path}: an index of version {about['version']}; make it again with {_command(tar)}")
            kinds = tuple((task, modality) for task, modality in about["kinds"])
            index = cls(
                tar=tar,
                size=about["bytes"],
                sha256=about["sha256"],
                kinds=kinds,
                processor=about["processor"],
                **arrays,
            )
            index._check()
        except FileNotFoundError:
            if tar.with_suffix(OLD_SUFFIX).exists():
                old = f"{tar.with_suffix(OLD_SUFFIX)}: an index of version 1"
                raise DataError(f"{old}; write the source again, or run {_command(tar)}") from None
            raise DataError(f"{path}: the shard {tar.name} has no index; make it with {_command(tar)}") from None
        except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
            raise DataError(
                f"{path}: not an index of a shard ({type(error).__name__}: {error}); write the source again"
            ) from None
        return index

    def _check(self) -> None:
        rows = len(self)
        members = len(self.offsets)
        counted = rows if self.processor else 0
        right = (
            len(self.kind) == rows
            and self.first[-1] == len(self.sizes) == len(self.checksums) == members
            and len(self.images) + rows == members
            and len(self.text) == len(self.visual) == counted
        )
        if not right:
            raise ValueError("its counts do not add up")
        if not all(((places >= 0) & (places <= self.size)).all() for places in (self.offsets, self.sizes)):
            raise ValueError(f"it names places outside of the {self.size} bytes of the tar")

    def verify(self, tar: Path) -> None:
        """Read the whole tar, or a copy of it, and compare its hash.

        Raises:
            DataError: the content is not what was indexed.
        """
        if hash_file(tar) != self.sha256:
            raise DataError(
                f"{tar}: its content is not what {index_path(self.tar).name} was made from; write the source again"
            )


def index_tar(tar: Path, counter: Counter | None = None, *, decode: bool = False) -> None:
    """Read a WebDataset tar and write its index next to it, in place of an earlier index.

    Args:
        counter: counts the tokens of each row, in order; without one the index has no token counts.
        decode: decode the pixels of all files, not only their headers.

    Raises:
        DataError: no tar or a truncated one, a row that `pack` would refuse, an unknown member, a key that occurs
            twice, or an image that cannot be used; names the file and the row.
    """
    kinds: dict[tuple[str, str], int] = {}
    kind: list[int] = []
    first = [0]
    spans: list[tuple[int, int, int]] = []
    images: list[tuple[int, int]] = []
    tokens: list[tuple[int, int]] = []
    for key, members, contents, counts in read_rows(tar):
        try:
            row = unpack(key, contents[0], contents[1:])
            images += _sizes(row, counts, decode=decode)
            if counter is not None:
                tokens.append(counter(row))
        except (RowError, ValueError) as error:
            raise DataError(f"{tar}: row {key!r}: {error}") from None
        kind.append(kinds.setdefault((row.task, row.modality), len(kinds)))
        spans += [
            (member.offset, member.size, crc32(content)) for member, content in zip(members, contents, strict=True)
        ]
        first.append(len(spans))
    arrays: dict[str, NDArray[Any]] = {
        "kind": np.array(kind, dtype=np.int16),
        "first": np.array(first, dtype=np.int32),
        "offsets": np.array([offset for offset, _, _ in spans], dtype=np.int64),
        "sizes": np.array([size for _, size, _ in spans], dtype=np.int32),
        "checksums": np.array([checksum for _, _, checksum in spans], dtype=np.uint32),
        "images": np.array(images, dtype=np.int32).reshape(-1, 2),
        "text": np.array([text for text, _ in tokens], dtype=np.int32),
        "visual": np.array([visual for _, visual in tokens], dtype=np.int32),
    }
    about = {"version": VERSION, "bytes": tar.stat().st_size, "sha256": hash_file(tar), "kinds": list(kinds)}
    about["processor"] = counter.processor if counter is not None else None
    unfinished = tar.with_suffix(".unfinished")
    unfinished.write_bytes(save(arrays, metadata={"index": json.dumps(about)}))
    unfinished.replace(index_path(tar))
    tar.with_suffix(OLD_SUFFIX).unlink(missing_ok=True)


def _sizes(row: Prompt, counts: Mapping[str, list[int]], *, decode: bool) -> list[tuple[int, int]]:
    """Return (width, height) of each file of a row.

    Args:
        counts: medium -> how many members of the tar each of its items has.

    Raises:
        ValueError: the row's json says otherwise, or an item cannot be used.
    """
    for name, medium in MEDIA.items():
        said = [len(files) for files in row.items(name)]
        if medium.counts and said != counts[name]:
            what = f"its {medium.items} have {said} {medium.files}"
            raise ValueError(f"its json says that {what}, and its members are {counts[name]}")
    return [size for medium, files in shown_items(row) for _, size in medium.check(files, decode=decode)]


def _command(tar: Path) -> str:
    return f"`mmopd index {tar.parent}`"
