"""The part of `mmopd prepare` that runs in many processes: converts examples to rows, in order."""

import os
import signal
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from mmopd import catalog, settings_file
from mmopd.errors import ConfigError, UserError
from mmopd.prompts.reading import SourceSettings, parse_line
from mmopd.prompts.rows import RowError, pack
from mmopd.prompts.tables import Bad
from mmopd.prompts.tokens import TokenCounter
from mmopd.records import Prompt
from mmopd.runtime.python import fork_server
from mmopd.task import Task
from mmopd.task.base import unverified
from mmopd.task.keys import fault
from mmopd.task.load import load_tasks

CHUNK = 16  # examples that a worker gets at a time
CHUNK_BYTES = 1 << 26  # of them, after which a chunk is closed
AHEAD = 3  # chunks for each worker that are in progress or waiting to be written


class Packed(NamedTuple):
    """An example that became a row."""

    key: str
    members: dict[str, bytes]  # extension -> content
    tokens: tuple[int, int]  # text, images; (0, 0) if they are not counted


class Left(NamedTuple):
    """An example that is bad, and is left out."""

    cause: str
    detail: str


@dataclass(frozen=True)
class Job:
    """Arguments of a worker."""

    converter: Path
    settings: str  # json
    processor: Path | None
    workspace: Path


@dataclass(frozen=True)
class Tools:
    """The parts that a `Job` names, loaded."""

    module: ModuleType
    settings: SourceSettings
    task: Task
    counter: TokenCounter | None


@lru_cache(maxsize=1)
def tools_of(job: Job) -> Tools:
    """Load the parts of a job, once in each process."""
    module = catalog.load_module(job.converter)
    settings: SourceSettings = module.Settings.model_validate_json(job.settings)
    tasks = load_tasks(job.workspace)
    if settings.task not in tasks:
        raise ConfigError(
            f"{job.converter}: task: no task {settings.task!r} in "
            f"modalities/{settings_file.suggest(settings.task, tasks)}"
        )
    return Tools(module, settings, tasks[settings.task], TokenCounter(job.processor) if job.processor else None)


def convert_all(job: Job, examples: Iterator[tuple[int, Any]], workers: int) -> Generator[Packed | Left | None]:
    """Convert the examples and yield in order: the row, a bad example, or None for one that is not wanted."""
    chunks = _chunks(examples)
    if workers == 1:
        yield from chain.from_iterable(_convert(job, chunk) for chunk in chunks)
        return
    context = fork_server([__name__])  # the imports take seconds; once for all workers
    pool = ProcessPoolExecutor(workers, context, _begin)
    waiting: deque[tuple[int, Future[list[Packed | Left | None]]]] = deque()  # (number of its first example, chunk)
    try:
        for chunk in chunks:
            waiting.append((chunk[0][0], pool.submit(_convert, job, chunk)))
            if len(waiting) >= AHEAD * workers:
                yield from waiting[0][1].result()
                waiting.popleft()
        while waiting:
            yield from waiting[0][1].result()
            waiting.popleft()
    except BrokenProcessPool:
        where = f"while converting examples from number {waiting[0][0]} on"
        raise UserError(
            f"a worker process died {where}: out of memory, or a fault in a library; finished shards are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(examples: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    chunk = list[tuple[int, Any]]()
    size = 0
    for numbered in examples:
        chunk.append(numbered)
        size += _bytes(numbered[1])
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _bytes(value: Any) -> int:
    """Return the size of the texts and files in an example."""
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _begin() -> None:
    """Prepare a worker process, before its first task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the process that writes
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _convert(job: Job, chunk: Sequence[tuple[int, Any]]) -> list[Packed | Left | None]:
    tools = tools_of(job)
    return [_convert_one(tools, number, example) for number, example in chunk]


def _convert_one(tools: Tools, number: int, example: Any) -> Packed | Left | None:
    try:
        parsed = parse_line(example) if isinstance(example, bytes) else example
        if isinstance(parsed, Bad):
            return Left(*parsed)
        prompt: Prompt | None = tools.module.convert(parsed, tools.settings, tools.task)
        if prompt is None:
            return None
        prompt = prompt if prompt.key else replace(prompt, key=str(number))
        _fits(prompt, tools.task)
        members = pack(prompt, decode=True)
        return Packed(prompt.key, members, tools.counter(prompt) if tools.counter else (0, 0))
    except RowError as error:
        return Left(error.cause, error.detail)
    except UserError:
        raise
    except Exception as error:  # an error of the converter on this example
        return Left(type(error).__name__, str(error))


def _fits(prompt: Prompt, task: Task) -> None:
    if (prompt.task, prompt.modality) != (task.name, task.modality):
        made = f"{prompt.task!r} ({prompt.modality})"
        wanted = f"{task.name!r} ({task.modality})"
        raise RowError("wrong task", f"a row of task {made}, but the source has task {wanted}")
    if task.verify is not unverified and isinstance(prompt.answer, str) and not prompt.answer.strip():
        raise RowError("no answer", "its answer is empty")
    if isinstance(prompt.answer, str) and (bad := fault(task, prompt.answer)):
        raise RowError(*bad)
