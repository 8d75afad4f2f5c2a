"""A pass over all rows of a mixture, before training: what is found about a row is kept beside the shards
(`prompts.ledger`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmopd.errors import ServerError
from mmopd.modality import Encoder
from mmopd.prompts.ledger import Ledger
from mmopd.prompts.rows import RowError
from mmopd.prompts.shards import Shards
from mmopd.records import Encoded
from mmopd.rollout.student_client import EngineError
from mmopd.runtime.progress import Stage
from mmopd.serving.servers import Servers

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
    """Keep what `find` says of every row that is not in its ledger yet; how many rows could not be read.

    Args:
        nothing: what is kept of a row that cannot be read.
        at_once: rows that are asked about at the same time.
    """
    unreadable = 0
    todo: Iterator[tuple[str, int]] = (
        (name, row) for name, shards in sources.items() for row in range(len(shards)) if row not in ledgers[name]
    )

    async def next_one_by_one() -> None:
        nonlocal unreadable
        for name, row in todo:  # the iterator is shared: a row is read when somebody is free to ask about it
            try:
                encoded = encoder.encode(sources[name][row])
            except (RowError, ValueError) as error:  # the row is bad; a source that cannot be read ends the pass
                unreadable += 1
                stage.note(f"{name}/{row} cannot be read: {error}")
                ledgers[name].add(row, *nothing)
            else:
                ledgers[name].add(row, *await find(encoded))
            stage.advance()

    await asyncio.gather(*(next_one_by_one() for _ in range(at_once)))
    return unreadable


@contextmanager
def answering(servers: Servers, logs: Path, what: str = "") -> Iterator[None]:
    """A pass over all rows, which ends where an engine does not answer.

    Raises:
        UserError: one does not; a server that has ended for good is named before what the pass says.
    """
    try:
        yield
    except EngineError as error:
        servers.check()
        raise ServerError(f"{what}{error}; the logs are in {logs}") from error
