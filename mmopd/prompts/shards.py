"""Prompts as WebDataset tars with an index beside each: written once, read by row number.

The format is WebDataset's, so that other tools read the same files; the reading is map-style, because an exactly
weighted plan that resumes exactly needs row numbers (a sequential reader has none). Images stay encoded.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from mmopd.config import Mixture, suggest
from mmopd.errors import UserError
from mmopd.modality.encode import open_image
from mmopd.prompts.index import Index, index_tar, parse_row
from mmopd.records import Prompt

EXTENSIONS = {"JPEG": "jpg"}  # where it is not the format's own name
NUMBERED = re.compile(r"shard-\d+-of-(\d+)\.tar")


class Shards(Sequence[Prompt]):
    """The rows of a folder of shards, by number, in the order in which they were written.

    Opening reads the indices and compares sizes; `verify` compares hashes. Reading opens no file for longer than one
    row takes, so that an instance is safe to use from threads and to hand to other processes.

    Args:
        folder: holds `*.tar` with `*.index.json`.
        name: of the source, the first part of each prompt's key; the folder's name if not given.

    Raises:
        UserError: no folder, no shard, no row, a missing, truncated or surplus file; names it.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder of shards")
        self.folder = folder
        self.name = name or folder.name
        indexed = (path.with_name(path.name.removesuffix(".index.json") + ".tar") for path in folder.glob("*.index.json"))
        tars = sorted({*folder.glob("*.tar"), *indexed})
        totals = [int(match[1]) for tar in tars if (match := NUMBERED.fullmatch(tar.name))]
        if totals and (len(set(totals)) > 1 or len(totals) != totals[0]):
            raise UserError(f"{folder}: {len(totals)} shards, and their names say there are {max(totals)}; write the source again")
        self._indices = [Index.load(tar) for tar in tars]
        self._starts = np.cumsum([0, *map(len, self._indices)])
        if not len(self):
            raise UserError(f"{folder}: no rows, in {len(tars)} shards")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> Prompt:  # type: ignore[override]
        """One prompt.

        Raises:
            IndexError: no such row.
            UserError: the tar has been cut or overwritten since it was opened.
        """
        index, local = self._locate(row)
        members = index.row_members(local)
        start = min(offset for offset, _ in members)
        end = max(offset + size for offset, size in members)
        try:
            file = os.open(index.tar, os.O_RDONLY)
            try:
                block = os.pread(file, end - start, start)
            finally:
                os.close(file)
            if len(block) != end - start:
                raise ValueError("the file ends inside the row")
            content, *images = (block[offset - start : offset - start + size] for offset, size in members)
            data = parse_row(content)
        except (OSError, ValueError) as error:
            raise UserError(f"{index.tar}: row {row} cannot be read ({error}); write the source again") from None
        return Prompt(f"{self.name}/{row}", data["task"], data["modality"], tuple(data["messages"]), tuple(images), data["answer"], data.get("extra", {}))

    def image_sizes(self, row: int) -> list[tuple[int, int]]:
        """(width, height) of each image of a row, in pixels, from the index alone."""
        index, local = self._locate(row)
        return index.row_images(local)

    @property
    def kinds(self) -> Counter[tuple[str, str]]:
        """(task, modality) -> rows, from the index alone."""
        return sum((index.kinds for index in self._indices), Counter[tuple[str, str]]())

    @property
    def fingerprint(self) -> str:
        """Names the content: changes with any byte of any shard, or with their order."""
        return hashlib.sha256("\n".join(index.sha256 for index in self._indices).encode()).hexdigest()

    def verify(self) -> None:
        """Read every byte and compare with the fingerprint.

        Raises:
            UserError: a shard's content is not what was indexed; names it.
        """
        for index in self._indices:
            index.verify()

    def _locate(self, row: int) -> tuple[Index, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"{self.folder}: row {row} of {len(self)}")
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._indices[shard], row - int(self._starts[shard])


def open_mixture(mixture: Mixture, tasks: Iterable[str], root: Path) -> dict[str, Shards]:
    """The sources of a mixture, by name.

    Args:
        tasks: names that there are.
        root: what relative `shards` paths start from.

    Raises:
        UserError: an unknown task, shards that cannot be opened, or rows of another task than the mixture says.
    """
    tasks = set(tasks)
    opened = {}
    for name, source in mixture.sources.items():
        if source.task not in tasks:
            raise UserError(f"sources.{name}.task: no task {source.task!r} in modalities/{suggest(source.task, tasks)}")
        opened[name] = shards = Shards(root / source.shards, name)
        if found := {task for task, _ in shards.kinds} - {source.task}:
            raise UserError(f"sources.{name}.task: {source.task!r}, and {shards.folder} has rows of task {', '.join(sorted(found))}")
    return opened


def write_shards(rows: Iterable[Prompt], folder: Path, *, max_rows: int = 10_000, max_bytes: int = 1 << 28) -> Shards:
    """Write rows as `shard-00000-of-00002.tar`, ... with their indices; the folder appears when it is complete.

    The tar key is the row number; a prompt's own key is kept in the json as `id`. The same rows give the same bytes.

    Args:
        max_rows: rows of a shard, at most.
        max_bytes: bytes of content after which a shard is closed.

    Raises:
        UserError: the folder has something in it, there are no rows, or a row is not well formed; names the row.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already there; remove it to write the source anew")
    partial = folder.with_name(f".{folder.name}.partial")  # a rest of an interrupted call is of no use
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tars = _write_tars(rows, partial, max_rows, max_bytes)
        if not tars:
            raise UserError(f"{folder}: there are no rows to write")
        for number, tar in enumerate(tars):
            named = tar.rename(partial / f"shard-{number:05d}-of-{len(tars):05d}.tar")
            index_tar(named)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Shards(folder)


def _write_tars(rows: Iterable[Prompt], folder: Path, max_rows: int, max_bytes: int) -> list[Path]:
    tars: list[Path] = []
    writer: TarWriter | None = None
    in_shard = content = 0
    try:
        for number, row in enumerate(rows):
            members = _members(row, number)
            if writer is None or in_shard >= max_rows or content >= max_bytes:
                if writer is not None:
                    writer.close()
                tars.append(folder / f"{len(tars):05d}.tar")
                writer, in_shard, content = TarWriter(str(tars[-1]), encoder=False, mtime=0, compress=False), 0, 0
            content += writer.write({"__key__": f"{number:08d}", **members})
            in_shard += 1
    finally:
        if writer is not None:
            writer.close()
    return tars


def _members(row: Prompt, number: int) -> dict[str, bytes]:
    """Extension -> content of a row.

    Raises:
        UserError: no messages, images that do not match the messages or the modality, or that cannot be opened.
    """
    named = f"row {number} ({row.key or 'no key'})"
    if not row.messages:
        raise UserError(f"{named}: it has no messages")
    if (placeholders := count_images(row.messages)) != len(row.images):
        raise UserError(f"{named}: {placeholders} image parts in its messages, and {len(row.images)} images")
    if (row.modality == "text") != (not row.images):
        raise UserError(f"{named}: {len(row.images)} images, and its modality is {row.modality!r}")
    members = {}
    for i, image in enumerate(row.images):
        try:
            form = open_image(image).format or "image"
        except ValueError as error:
            raise UserError(f"{named}: image {i}: {error}") from None
        members[f"{i}.{EXTENSIONS.get(form, form.lower())}"] = image
    fields = {"id": row.key, "task": row.task, "modality": row.modality, "messages": row.messages, "answer": row.answer}
    fields |= {"extra": row.extra} if row.extra else {}
    content = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    try:
        parse_row(content)
    except ValueError as error:
        raise UserError(f"{named}: {error}") from None
    return {"json": content, **members}


def count_images(messages: Iterable[Mapping[str, object]]) -> int:
    """Image parts in the messages of a chat."""
    contents = (message.get("content") for message in messages)
    parts = (part for content in contents if isinstance(content, list | tuple) for part in content)
    return sum(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)
