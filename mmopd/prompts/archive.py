"""Read the rows of a WebDataset tar from any tool: `KEY.json`, `KEY.0.png`, ..., one key after the other.

Members are read at their offsets, as a run reads them, and not through tarfile, which would fill the holes of a sparse
member. Hard and symbolic links to earlier members are followed. Notes that macOS adds (`._NAME`) are passed over.
"""

import collections
import io
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mmopd.errors import DataError
from mmopd.modality.registry import MEDIA

JSON = (-1, 0, 0)  # place of a row's json; it comes first
FORMS = ("KEY.json", *(f"KEY.{medium.member_form}" for medium in MEDIA.values()))


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    offset: int  # position of its content, in bytes
    size: int  # bytes


MAX_MEMBER = 1 << 28  # bytes; an image of a converter has at most a quarter
Row = tuple[str, list[Member], list[bytes], dict[str, list[int]]]


class Bounded(io.BufferedReader):
    """A tar of which at most the size of a member is read at a time: a header of notes may name any size."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        """Return some bytes.

        Raises:
            ReadError: it is asked for too many, or for all.
        """
        if size is None or not 0 <= size <= MAX_MEMBER:
            raise tarfile.ReadError(f"a header with {size} bytes")
        return super().read(size)


def read_rows(tar: Path) -> Iterator[Row]:
    """Yield (key, members, contents, medium -> files of each item) of each row.

    The members are the row's json, its images, and the files of other media, by number.

    Raises:
        DataError: no tar or a truncated one, a member that is no file of a row, or a row with missing files; names it.
    """
    from webdataset.tariterators import base_plus_ext  # imports torch, and reading an index needs neither

    check_regular(tar)
    seen: set[str] = set()
    try:
        with Bounded(tar) as file, tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
            key = ""
            row = list[tuple[str, Member]]()
            for member in _members(tar, archive):
                stem, extension = base_plus_ext(member.name)
                if stem is None:
                    raise DataError(
                        f"{tar}: the member {member.name!r} has no extension; a row has {', '.join(FORMS)}: remove it"
                    )
                if stem != key:
                    if row:
                        yield _read(tar, file.fileno(), key, row)
                    if stem in seen:
                        raise DataError(f"{tar}: the key {stem!r} occurs twice")
                    seen.add(stem)
                    key = stem
                    row = []
                row.append((extension.lower(), member))
            if row:
                yield _read(tar, file.fileno(), key, row)
            check_end(tar, archive.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{tar}: not a tar, or a truncated one ({error})") from None


def check_regular(path: Path) -> None:
    """Check that a path, if it exists, is a file: a pipe would never end, and a device would fill the memory.

    Raises:
        DataError: it is something else.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: not a file, but a folder, a pipe or a device; remove it")


def _members(tar: Path, archive: tarfile.TarFile) -> Iterator[Member]:
    """Yield the files of a tar in order; a link has the content of the file that it leads to."""
    found: dict[str, Member] = {}
    for info in archive:
        name = posixpath.normpath(info.name)
        if info.isdir() or posixpath.basename(name).startswith("._"):
            continue
        if info.issparse():
            raise DataError(f"{tar}: the member {info.name!r} is sparse; write the tar without --sparse")
        if info.issym() or info.islnk():
            base = posixpath.dirname(name) if info.issym() else ""
            target = posixpath.normpath(posixpath.join(base, info.linkname))
            if target not in found:
                raise DataError(
                    f"{tar}: the member {info.name!r} is a link to {info.linkname!r}, which is no earlier member; "
                    "write the tar with --dereference --hard-dereference"
                )
            found[name] = found[target]._replace(name=info.name)
        elif info.isreg() and not 0 <= info.size <= MAX_MEMBER:
            raise DataError(
                f"{tar}: the member {info.name!r} has {info.size:,} bytes; at most {MAX_MEMBER:,}: remove it"
            )
        elif info.isreg():
            found[name] = Member(info.name, info.offset_data, info.size)
        else:
            raise DataError(f"{tar}: the member {info.name!r} is neither a file nor a folder nor a link; remove it")
        yield found[name]


def check_end(tar: Path, offset: int) -> None:
    """Check that a tar ends in zeros: tarfile takes a broken header for the end too."""
    with tar.open("rb") as file:
        file.seek(offset)
        rest = 0
        while block := file.read(1 << 20):
            rest += len(block)
            if block.strip(b"\0"):
                raise tarfile.ReadError(f"no header and no end at byte {offset}")
    if rest < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"no header and no end at byte {offset}")


def _read(tar: Path, file: int, key: str, row: list[tuple[str, Member]]) -> Row:
    numbered: dict[tuple[int, int, int], Member] = {}
    for extension, member in row:
        place = _place(extension)
        if place is None or place in numbered:
            what = f"is neither {', '.join(FORMS[:-1])} nor {FORMS[-1]}, or occurs twice"
            raise DataError(f"{tar}: row {key!r}: member {member.name!r} {what}")
        numbered[place] = member
    found = collections.Counter((medium, item) for medium, item, _ in numbered if medium >= 0)
    items = collections.Counter(medium for medium, _ in found)
    counts = [[found[medium, item] for item in range(items[medium])] for medium in range(len(MEDIA))]
    needed = [
        (medium, item, file)
        for medium, each in enumerate(counts)
        for item, files in enumerate(each)
        for file in range(files)
    ]
    if sorted(numbered) != [JSON, *needed]:
        names = [member.name for _, member in row]
        files = ", ".join(f"{medium.files} from 0 on" for medium in MEDIA.values() if medium.counts)
        raise DataError(
            f"{tar}: row {key!r}: it has the members {names}; needed are one json, images from 0 on, and {files}"
        )
    members = [numbered[place] for place in sorted(numbered)]
    contents = [os.pread(file, member.size, member.offset) for member in members]
    for member, content in zip(members, contents, strict=True):
        if len(content) != member.size:
            raise DataError(f"{tar}: truncated inside {member.name!r}")
    return key, members, contents, dict(zip(MEDIA, counts, strict=True))


def _place(extension: str) -> tuple[int, int, int] | None:
    """Return (number of the medium, of the item, of the file) of a member, or `JSON`; None if it is neither."""
    if extension == "json":
        return JSON
    for number, medium in enumerate(MEDIA.values()):
        if found := re.fullmatch(medium.pattern, extension):
            return number, int(found["item"]), int(found["file"] or 0)
    return None
