"""A pass over all rows before training: what is kept of a bad row, and of a row that could not be fetched."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmopd.errors import UserError
from mmopd.passes.each_row import answering, each_row
from mmopd.prompts.rows import RowError
from mmopd.rollout.student_client import EngineError


class Rows:
    """Three rows; the second cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 3

    def __getitem__(self, row: int) -> str:
        if row == 1:
            raise self.error
        return f"row {row}"


class Kept(dict[int, tuple[Any, ...]]):
    def add(self, row: int, *found: Any) -> None:
        self[row] = found


def run(error: Exception, kept: Kept) -> int:
    async def find(encoded: str) -> tuple[str]:
        return (encoded,)

    encoder, stage = (
        SimpleNamespace(encode=lambda row: row),
        SimpleNamespace(note=lambda text: None, advance=lambda: None),
    )
    passing = each_row({"s": Rows(error)}, {"s": kept}, encoder, find, (None,), at_once=1, stage=stage)  # type: ignore
    return asyncio.run(passing)


@pytest.mark.parametrize("error", [RowError("unreadable", "row 1 is no prompt"), ValueError("too large")])
def test_a_bad_row_is_kept_as_one_about_which_nothing_was_found(error: Exception) -> None:
    kept = Kept()
    assert run(error, kept) == 1
    assert kept == {0: ("row 0",), 1: (None,), 2: ("row 2",)}


def test_a_source_that_cannot_be_read_any_more_ends_the_pass_and_is_no_finding() -> None:
    kept = Kept()
    with pytest.raises(UserError, match="the shard cannot be read any more"):
        run(UserError("s.tar: the shard cannot be read any more"), kept)
    assert kept == {0: ("row 0",)}


def test_an_engine_that_does_not_answer_ends_the_pass_and_a_server_that_has_ended_is_named_before_it() -> None:
    def ended() -> None:
        raise UserError("server 'student' ended")

    def passing(check: Callable[[], None]) -> None:
        with answering(SimpleNamespace(check=check), Path("logs"), "a teacher did not answer: "):  # type: ignore[arg-type]
            raise EngineError("no connection")

    with pytest.raises(UserError, match=r"^a teacher did not answer: no connection; the logs are in logs$"):
        passing(lambda: None)
    with pytest.raises(UserError, match=r"^server 'student' ended$"):
        passing(ended)
