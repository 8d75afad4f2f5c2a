"""`mmopd prepare data/SOURCE.py OUT`: converts data of any form into shards, in parallel, in order, and resumably.

A converter is a file of `data/` with three names (`mmopd.prompts.convert` has helpers for them):

    class Settings(SourceSettings): ...
        Its keys are what `--set KEY=VALUE` changes: `task`, and others that name columns.
    def examples(settings) -> Iterable
        Returns the examples, always in the same order. It must be cheap: one process reads them.
    def convert(example, settings, task) -> Prompt | None
        Converts one example, in one of many processes; an empty key becomes the example's number.

`convert` returns None for an example that is not wanted, and raises RowError (or ValueError, KeyError, ...) for a bad
one, which is left out and counted by cause. Lines of .jsonl files are parsed before they are passed.

Shards are cut by rows and bytes alone, and the progress up to the end of each shard is saved. A resumed call therefore
gives the same bytes as an uninterrupted one, with any number of workers.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from operator import length_hint
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mmopd import catalog, settings_file
from mmopd.errors import ConfigError, DataError
from mmopd.prompts import index
from mmopd.prompts.index import Index, index_tar
from mmopd.prompts.reading import SourceSettings
from mmopd.prompts.rows import plain, unpack
from mmopd.prompts.shards import Shards
from mmopd.prompts.tokens import hash_processor
from mmopd.prompts.work import Job, Left, convert_all, tools_of
from mmopd.prompts.writer import MAX_BYTES, MAX_ROWS, ShardWriter, check_free, partial_folder, publish
from mmopd.records import Prompt
from mmopd.runtime.fingerprint import hash_file
from mmopd.runtime.locks import claim
from mmopd.runtime.progress import Stage

SHOWN = 3  # rows that are shown first; of those left out, for each cause
HOPELESS = 500  # bad examples without a single row, after which the call ends
SUMMARY = "prepare.json"
PROGRESS = "progress.json"


@dataclass
class Count:
    """Number of examples by result: `examples` = `rows` + `not_wanted` + the sum of `left_out`."""

    examples: int = 0
    rows: int = 0
    shards: int = 0
    not_wanted: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # cause -> examples
    shown: dict[str, list[str]] = field(default_factory=dict)  # cause -> the first few, with their numbers

    def leave_out(self, cause: str, detail: str) -> None:
        """Count a bad example."""
        self.left_out[cause] += 1
        if len(shown := self.shown.setdefault(cause, [])) < SHOWN:
            shown.append(f"example {self.examples}: {plain(detail[:500])}")

    def lines(self) -> list[str]:
        """Return the causes why examples were left out, as lines of text."""
        return [
            line
            for cause, n in self.left_out.most_common()
            for line in (f"{n:,} x {cause}", *(f"  {one}" for one in self.shown[cause]))
        ]


class First(NamedTuple):
    """A row as it will be asked."""

    number: int  # of its example
    prompt: Prompt
    tokens: int | None  # images included; None if they are not counted


def load_converter(path: Path, overrides: Iterable[str]) -> tuple[ModuleType, SourceSettings]:
    """Load the converter of a file, and its settings with `key=value` on top.

    Raises:
        ConfigError: the file is not a converter, or a setting does not fit.
    """
    module = catalog.load_module(path)
    for name in ("Settings", "examples", "convert"):
        if not hasattr(module, name):
            raise ConfigError(f"{path}: not a converter, it has no `{name}`; it needs Settings, examples and convert")
    settings: SourceSettings = settings_file.build(module.Settings, {}, str(path), overrides)
    return module, settings


def opened(converter: Path, overrides: Iterable[str], processor: Path | None) -> tuple[ModuleType, SourceSettings, Job]:
    """Load a converter with its settings, and all that one example needs to become a row.

    Raises:
        ConfigError: the converter, a setting or the task cannot be used.
        CheckpointError: `processor` is no folder of a model.
    """
    module, settings = load_converter(converter, overrides)
    job = Job(converter.resolve(), settings.model_dump_json(), processor.resolve() if processor else None, Path.cwd())
    tools_of(job)  # fails now if something is missing
    return module, settings, job


def first_rows(
    converter: Path, overrides: Iterable[str] = (), *, processor: Path | None = None, rows: int = SHOWN
) -> tuple[list[First], Count]:
    """Convert examples until there are some rows; return these, and what became of the examples. Nothing is written.

    Args:
        converter, overrides, processor: as for `prepare`.
        rows: the number of rows, if the first `HOPELESS` examples have as many.

    Raises:
        UserError: as for `prepare`.
    """
    module, settings, job = opened(converter, overrides, processor)
    first = list[First]()
    count = Count()
    for number, example in islice(enumerate(module.examples(settings)), HOPELESS):
        (outcome,) = convert_all(job, iter([(number, example)]), workers=1)
        if isinstance(outcome, Left):
            count.leave_out(*outcome)
        elif outcome is None:
            count.not_wanted += 1
        else:
            content, *files = outcome.members.values()
            first.append(First(number, unpack(outcome.key, content, files), sum(outcome.tokens) or None))
            count.rows += 1
        count.examples += 1
        if count.rows == rows:
            break
    return first, count


def prepare(
    converter: Path,
    folder: Path,
    overrides: Iterable[str] = (),
    *,
    processor: Path | None = None,
    workers: int = 1,
    max_bad: float = 0.01,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
    stage: Stage | None = None,
) -> tuple[Shards, Count]:
    """Convert data and write it as shards; `folder` appears when it is complete.

    Args:
        converter: a file as described above.
        overrides: `key=value` pairs for its settings.
        processor: model folder for which tokens are counted; without one they are not counted.
        workers: processes that convert; 1 converts in this one.
        max_bad: share of the examples that may be left out as bad.
        max_rows: rows of a shard, at most.
        max_bytes: bytes of content after which a shard is closed.
        stage: shows the progress.

    Raises:
        UserError: `folder` is not empty.
        ConfigError: the converter cannot be used.
        DataError: its data cannot be used, or too many examples are bad.
    """
    check_free(folder)
    module, settings, job = opened(converter, overrides, processor)
    made_from = {
        "converter": hash_file(converter),
        "settings": settings.model_dump(mode="json"),
        "processor": hash_processor(processor) if processor else None,
        "shard": [index.VERSION, max_rows, max_bytes],
    }
    with _opened(partial_folder(folder), made_from) as (partial, count):
        examples = module.examples(settings)
        if stage is not None:
            stage.total(length_hint(examples), count.examples)
        numbered = islice(enumerate(examples), count.examples, None)
        _write(job, numbered, partial, made_from, count, workers=workers, limits=(max_rows, max_bytes), stage=stage)
        check(count, max_bad, folder)
        (partial / SUMMARY).write_text(json.dumps({"made_from": made_from, **vars(count)}, indent=1), encoding="utf-8")
        (partial / PROGRESS).unlink(missing_ok=True)
        shards = publish(partial, [partial / f"{number:05d}.tar" for number in range(count.shards)], folder)
    return shards, count


def _write(
    job: Job,
    examples: Iterator[tuple[int, Any]],
    partial: Path,
    made_from: dict[str, Any],
    count: Count,
    *,
    workers: int,
    limits: tuple[int, int],
    stage: Stage | None,
) -> None:
    seen = set(_keys(partial, count.shards))
    tokens = list[tuple[int, int]]()

    def finish(tar: Path) -> None:
        index_tar(tar, _Known(made_from["processor"], iter(tokens)) if job.processor else None)
        tokens.clear()
        count.shards += 1
        _save(partial / PROGRESS, {"made_from": made_from, **vars(count)})

    writer = ShardWriter(partial, max_rows=limits[0], max_bytes=limits[1], shards=count.shards, rows=count.rows)
    with closing(convert_all(job, examples, workers)) as outcomes, writer:
        for outcome in outcomes:
            closed = None
            if outcome is None:
                count.not_wanted += 1
            elif isinstance(outcome, Left):
                count.leave_out(*outcome)
            elif outcome.key in seen:
                count.leave_out("duplicate key", f"an earlier row has the key {outcome.key!r} too")
            else:
                seen.add(outcome.key)
                tokens.append(outcome.tokens)
                closed = writer.add(outcome.members)
                count.rows += 1
            count.examples += 1
            if closed is not None:
                finish(closed)
            if not count.rows and sum(count.left_out.values()) >= HOPELESS:
                break
            if stage is not None:
                stage.advance()
                stage.note(f"{count.rows:,} rows, {sum(count.left_out.values()):,} left out")
        if (last := writer.close()) is not None:
            finish(last)


def check(count: Count, max_bad: float, folder: Path) -> None:
    """Refuse a source without rows, or with too many bad examples.

    Raises:
        DataError: names the causes.
    """
    bad = sum(count.left_out.values())
    lines = "".join(f"\n  {line}" for line in count.lines())
    if not count.rows:
        raise DataError(
            f"{folder}: none of {count.examples:,} examples became a row; {count.not_wanted:,} were not wanted{lines}"
        )
    if bad > max_bad * (count.rows + bad):
        total = count.rows + bad
        share = f"{bad:,} of {total:,} examples ({bad / total:.1%}) are bad, more than --max-bad {max_bad:.1%}"
        raise DataError(f"{folder}: {share}; the work is kept, so a call with a higher --max-bad ends soon{lines}")


@dataclass(frozen=True)
class _Known:
    """A `Counter` for rows whose tokens are counted already."""

    processor: str
    tokens: Iterator[tuple[int, int]]

    def __call__(self, prompt: Prompt) -> tuple[int, int]:
        return next(self.tokens)


@contextmanager
def _opened(partial: Path, made_from: dict[str, Any]) -> Iterator[tuple[Path, Count]]:
    """Yield the locked folder of an unfinished source, and its progress; one process at a time."""
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        claim(lock, partial, "call is writing this source now")
        yield partial, _resume(partial, made_from)
    finally:
        os.close(lock)


def _resume(partial: Path, made_from: dict[str, Any]) -> Count:
    """Return the progress of an earlier call with the same inputs, and remove everything else that it left."""
    count = Count()
    try:
        kept = json.loads((partial / PROGRESS).read_text(encoding="utf-8"))
        if kept.pop("made_from") == made_from:
            count = Count(**kept | {"left_out": Counter(kept["left_out"])})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass  # there is no complete progress file
    finished = {f"{number:05d}{suffix}" for number in range(count.shards) for suffix in (".tar", index.SUFFIX)}
    for path in partial.iterdir():
        if path.name not in finished | {PROGRESS}:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return count


def _keys(partial: Path, shards: int) -> Iterator[str]:
    """Yield the keys of the rows in finished tars."""
    for number in range(shards):
        done = Index.load(partial / f"{number:05d}.tar")
        for row in range(len(done)):
            yield json.loads(done.read(done.tar, row)[0])["id"]


def _save(path: Path, content: dict[str, Any]) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content), encoding="utf-8")
    unfinished.replace(path)
