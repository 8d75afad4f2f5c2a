"""Run over all rows of a mixture before training; results are stored next to the shards (`prompts.ledger`)."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmopd.errors import ServerError
from mmopd.modality import Encoder
from mmopd.prompts.ledger import Ledger
from mmopd.prompts.prompt_plan import MAX_BAD
from mmopd.prompts.rows import RowError
from mmopd.prompts.shards import Shards
from mmopd.records import Encoded
from mmopd.rollout.student_client import EngineError, PromptRefusedError
from mmopd.runtime.progress import Stage
from mmopd.serving.servers import Servers
from mmopd.teacher.view import ViewError

Find = Callable[[Encoded], Awaitable[Sequence[Any]]]


async def each_row(
    sources: Mapping[str, Shards],
    ledgers: Mapping[str, Ledger],
    encoder: Encoder,
    find: Find,
    nothing: Sequence[Any],
    *,
    at_once: int,
    stage: Stage,
) -> int:
    """Store the result of `find` for every row that is not in its ledger yet; return how many rows could not be read.

    A row that the engine refuses, or that cannot be shown to its teacher, counts as unreadable if another one works.

    Args:
        nothing: stored for a row that cannot be read.
        at_once: rows processed in parallel.

    Raises:
        PromptRefusedError, ViewError: no row works, or MAX_BAD consecutive ones do not.
    """
    unreadable = 0
    works = any(len(ledger) for ledger in ledgers.values())
    refused: list[tuple[str, int, Exception]] = []  # since a row worked
    todo: Iterator[tuple[str, int]] = (
        (name, row) for name, shards in sources.items() for row in range(len(shards)) if row not in ledgers[name]
    )

    def bad(name: str, row: int, error: Exception) -> None:
        nonlocal unreadable
        unreadable += 1
        stage.note(f"{name}/{row} cannot be read: {error}")
        ledgers[name].add(row, *nothing)

    def store_refused() -> None:
        for one in refused:
            bad(*one)
        refused.clear()

    async def next_one_by_one() -> None:
        nonlocal works
        for name, row in todo:  # the iterator is shared: a row is read when a task is free for it
            try:
                encoded = encoder.encode(sources[name][row])
            except (RowError, ValueError) as error:  # a bad row is skipped; an unreadable source ends the pass
                bad(name, row, error)
            else:
                try:
                    ledgers[name].add(row, *await find(encoded))
                    works = True
                    store_refused()
                except (PromptRefusedError, ViewError) as error:
                    refused.append((name, row, error))
                    if len(refused) >= MAX_BAD:
                        raise
            stage.advance()

    await asyncio.gather(*(next_one_by_one() for _ in range(at_once)))
    if len(refused) > 1 and not works:
        raise refused[0][2]
    store_refused()
    return unreadable


@contextmanager
def answering(servers: Servers, logs: Path, what: str = "") -> Iterator[None]:
    """Turn an engine failure during a pass into a UserError.

    Raises:
        ServerError: an engine does not answer; if a server has ended permanently, the error names it instead.
    """
    try:
        yield
    except EngineError as error:
        servers.check()
        raise ServerError(f"{what}{error}; the logs are in {logs}") from error
