"""Prompts as WebDataset tars with an index next to each: written once, read by row number.

The format is WebDataset's, so other tools can read the files. The reading is map-style: an exactly weighted plan that
resumes exactly needs row numbers, which a sequential reader does not have. Images stay encoded.
"""

import copy
import hashlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mmopd.config import Mixture
from mmopd.errors import ConfigError, DataError
from mmopd.prompts.index import SUFFIX, Index
from mmopd.prompts.remote import Cache, Remote, is_remote
from mmopd.prompts.rows import RowError, unpack
from mmopd.records import Prompt
from mmopd.settings_file import suggest

NUMBERED = re.compile(r"shard-\d+-of-(\d+)\.tar")


@dataclass(frozen=True, slots=True)
class Totals:
    """Size of a source, from its indices alone."""

    rows: int
    images: int
    text: int | None  # tokens; None where they were not counted
    visual: int | None  # tokens of images


class Shards(Sequence[Prompt]):
    """The rows of a folder of shards by number, in the order in which they were written.

    Opening reads the indices and compares sizes; `verify` compares hashes. No file stays open after a row is read, so
    an instance can be used from several threads and sent to other processes.

    Args:
        folder: holds `*.tar` with `*.index.safetensors`.
        name: name of the source, the first part of each prompt's key; the folder's name if not given.
        remote: where the tars are, if they are not in the folder.

    Raises:
        DataError: no folder, no shard, no row, a missing, truncated or surplus file; names it.
    """

    def __init__(self, folder: Path, name: str | None = None, remote: Remote | None = None) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of shards")
        self.folder = folder
        self.name = name or folder.name
        self.left_out: Counter[str] = Counter()  # cause -> number of rows that `filtered` left out
        self._remote = remote
        indexed = (path.with_name(path.name.removesuffix(SUFFIX) + ".tar") for path in folder.glob(f"*{SUFFIX}"))
        tars = sorted({*folder.glob("*.tar"), *indexed})
        totals = [int(match[1]) for tar in tars if (match := NUMBERED.fullmatch(tar.name))]
        if totals and (len(set(totals)) > 1 or len(totals) != totals[0]):
            raise DataError(
                f"{folder}: {len(totals)} shards, but their names say there are {max(totals)}; write the source again"
            )
        self._indices = [Index.load_alone(tar) if remote else Index.load(tar) for tar in tars]
        self._starts = [0, *np.cumsum([len(index) for index in self._indices]).tolist()]
        self._kept: NDArray[np.int64] | None = None  # numbers of the rows that `filtered` kept; None for all
        if not len(self):
            raise DataError(f"{folder}: no rows, in {len(tars)} shards")

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._kept is None else len(self._kept)

    def __getitem__(self, row: int) -> Prompt:  # type: ignore[override]
        """Return one prompt.

        Raises:
            IndexError: no such row.
            RowError: the content of the row is not valid.
            DataError: the tar cannot be read any more.
        """
        number = self._number(row)
        index, local = self._locate(number)
        try:
            content, *images = self._remote.read(index, local) if self._remote else index.read(index.tar, local)
            return unpack(self.key(row), content, images)
        except OSError as error:
            raise DataError(f"{index.tar}: the shard cannot be read any more ({error.strerror or error})") from None
        except (ValueError, RowError) as error:
            cause = error.cause if isinstance(error, RowError) else "unreadable"
            raise RowError(
                cause, f"{index.tar}: row {number} cannot be read ({error}); write the source again"
            ) from None

    def row_of(self, key: str) -> int:
        """Return the row number of the prompt with this key."""
        number = int(key.rpartition("/")[2])
        return number if self._kept is None else int(np.searchsorted(self._kept, number))

    def filtered(self, max_tokens: int) -> Self:
        """Return the rows with at most `max_tokens` tokens, images included; the others are counted in `left_out`.

        Only the index is read.

        Raises:
            DataError: the tokens are not counted, or no row is left.
        """
        if self.processor is None:
            raise DataError(
                f"{self.folder}: its tokens have not been counted; "
                f"`mmopd index {self.folder} --processor MODEL` counts them"
            )
        total = np.concatenate([index.text + index.visual for index in self._indices])
        before = np.arange(len(total)) if self._kept is None else self._kept
        shorter = copy.copy(self)
        shorter._kept = before[total[before] <= max_tokens]
        shorter.left_out = self.left_out + Counter({f"over {max_tokens} tokens": len(before) - len(shorter._kept)})
        if not len(shorter):
            raise DataError(
                f"{self.folder}: each of its {len(before)} rows has more than {max_tokens} tokens (max_prompt_tokens)"
            )
        return shorter

    def image_sizes(self, row: int) -> list[tuple[int, int]]:
        """Return (width, height) of each image of a row, in pixels, from the index alone."""
        index, local = self._locate(self._number(row))
        return index.row_images(local)

    def tokens(self, row: int) -> int | None:
        """Return the tokens of a row, images included, from the index alone; None if they are not counted."""
        index, local = self._locate(self._number(row))
        return int(index.text[local] + index.visual[local]) if index.processor else None

    def kind(self, row: int) -> tuple[str, str]:
        """Return (task, modality) of a row, from the index alone."""
        index, local = self._locate(self._number(row))
        return index.kinds[int(index.kind[local])]

    def key(self, row: int) -> str:
        """Return the key of a row's prompt, without reading it."""
        return f"{self.name}/{self._number(row)}"

    def rows_in(self, tar: str) -> range:
        """Return the numbers of the rows of a tar, by the name of its file, of shards that are not `filtered`."""
        i = [index.tar.name for index in self._indices].index(tar)
        return range(self._starts[i], self._starts[i + 1])

    @property
    def processor(self) -> str | None:
        """Processor for which all rows' tokens are counted (`tokens.hash_processor`); None for none or several."""
        processors = {index.processor for index in self._indices}
        return processors.pop() if len(processors) == 1 else None

    @property
    def kinds(self) -> Counter[tuple[str, str]]:
        """(task, modality) -> rows, from the index alone."""
        counts: Counter[tuple[str, str]] = Counter()
        for index, chosen in self._chosen():
            rows = np.bincount(index.kind[chosen], minlength=len(index.kinds)).tolist()
            counts.update({kind: n for kind, n in zip(index.kinds, rows, strict=True) if n})
        return counts

    def totals(self) -> Totals:
        """Return rows, images and tokens, from the index alone."""
        counted = self.processor is not None
        sums = [
            (
                int(index.image_counts()[chosen].sum()),
                *(int(part[chosen].sum()) if counted else 0 for part in (index.text, index.visual)),
            )
            for index, chosen in self._chosen()
        ]
        images, text, visual = (sum(column) for column in zip(*sums, strict=True))
        return Totals(len(self), images, text if counted else None, visual if counted else None)

    @property
    def bytes(self) -> int:
        """Total size of all shards."""
        return sum(index.size for index in self._indices)

    @property
    def fingerprint(self) -> str:
        """Hash of the content: changes with any byte of any shard, their order, and the rows that `filtered` kept."""
        digest = hashlib.sha256("\n".join(index.sha256 for index in self._indices).encode())
        if self._kept is not None and len(self._kept) < self._starts[-1]:
            digest.update(self._kept.tobytes())
        return digest.hexdigest()

    def verify(self) -> None:
        """Read every byte and compare the hash of each shard with its index.

        Raises:
            DataError: a shard's content is not what was indexed; names it.
        """
        for index in self._indices:
            index.verify(self._remote.fetch(index) if self._remote else index.tar)

    def _number(self, row: int) -> int:
        """Return the number of a row among those that were written."""
        if not 0 <= row < len(self):
            raise IndexError(f"{self.folder}: row {row} of {len(self)}")
        return row if self._kept is None else int(self._kept[row])

    def _locate(self, number: int) -> tuple[Index, int]:
        shard = bisect_right(self._starts, number) - 1
        return self._indices[shard], number - self._starts[shard]

    def _chosen(self) -> Iterable[tuple[Index, NDArray[np.int64] | slice]]:
        """Yield each index with those of its rows that are kept."""
        for index, start, end in zip(self._indices, self._starts[:-1], self._starts[1:], strict=True):
            if self._kept is None:
                yield index, slice(None)
            else:
                yield index, self._kept[np.searchsorted(self._kept, start) : np.searchsorted(self._kept, end)] - start


def open_mixture(mixture: Mixture, tasks: Iterable[str], root: Path, processor: str | None = None) -> dict[str, Shards]:
    """Open the sources of a mixture, by name, each without the rows that the mixture leaves out.

    Args:
        tasks: names of the known tasks.
        root: folder from which relative `shards` paths start, and in which copies of remote shards are kept.
        processor: hash of the student's processor (`tokens.hash_processor`); a token limit on rows that were counted
            for another processor is refused.

    Raises:
        ConfigError: the mixture names an unknown task, or a task that its rows do not have.
        DataError: shards cannot be opened.
    """
    check_tasks(mixture, tasks)
    cache = Cache(root / ".mmopd" / "shards", int(mixture.cache_gib * 2**30))
    opened = {}
    for name, source in mixture.sources.items():
        try:
            shards = (
                open_remote(str(source.shards), cache, name)
                if is_remote(source.shards)
                else Shards(root / source.shards, name)
            )
        except DataError as error:
            raise DataError(f"sources.{name}.shards: {error}") from None
        if found := {task for task, _ in shards.kinds} - {source.task}:
            raise ConfigError(
                f"sources.{name}.task: {source.task!r}, but {shards.folder} has rows of task {', '.join(sorted(found))}"
            )
        if source.max_prompt_tokens is not None:
            if processor and shards.processor and processor != shards.processor:
                where = f"sources.{name}.max_prompt_tokens: its tokens were counted for another processor"
                raise DataError(
                    f"{where} than the student's; `mmopd index {source.shards} --processor STUDENT` counts them again"
                )
            shards = shards.filtered(source.max_prompt_tokens)
        opened[name] = shards
    return opened


def check_tasks(mixture: Mixture, tasks: Iterable[str]) -> None:
    """Check that every source has one of the known tasks.

    Raises:
        ConfigError: names the first that has not.
    """
    tasks = set(tasks)
    for name, source in mixture.sources.items():
        if source.task not in tasks:
            raise ConfigError(
                f"sources.{name}.task: no task {source.task!r} in modalities/{suggest(source.task, tasks)}"
            )


def open_remote(url: str, cache: Cache, name: str | None = None) -> Shards:
    """Open the shards of an fsspec URL: their indices are read now, a tar when one of its rows is needed.

    Raises:
        DataError: nothing can be read under the URL.
    """
    remote = Remote(url, cache)
    return Shards(remote.read_indices(), name or url.rstrip("/").rpartition("/")[2], remote)
