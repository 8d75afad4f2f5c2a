"""Kinds of errors, and the exit statuses that tell a script which kind occurred."""

import re
import sys
from pathlib import Path

import pytest

from mmopd import cli
from mmopd.errors import KINDS, CheckpointError, ConfigError, DataError, ServerError, UserError, kind_of
from mmopd.prompts.rows import RowError

ROOT = Path(__file__).parents[1]


def test_every_kind_has_a_status_of_its_own() -> None:
    kinds = {UserError, *UserError.__subclasses__()}
    assert {kind.exit_status for kind in kinds} == {2, 3, 4, 5, 6}
    assert set(KINDS.values()) == kinds


def test_the_page_on_exit_statuses_lists_every_kind() -> None:
    page = (ROOT / "docs" / "reference" / "exit-statuses.md").read_text(encoding="utf-8")
    listed = {int(status): name for status, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", page, re.MULTILINE)}
    assert listed == {status: kind.__name__ for status, kind in KINDS.items()}


def test_the_status_of_a_process_names_the_kind_of_its_error() -> None:
    assert kind_of(DataError.exit_status) is DataError
    assert kind_of(-9) is kind_of(124) is kind_of(None) is UserError


def test_a_row_that_cannot_be_used_is_an_error_of_data() -> None:
    assert RowError("no text", "there is no text").exit_status == DataError.exit_status


@pytest.mark.parametrize("kind", [UserError, ConfigError, DataError, ServerError, CheckpointError])
def test_the_command_line_ends_with_the_message_and_the_status_of_its_kind(
    kind: type[UserError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise kind("shards/[a].tar: truncated")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == kind.exit_status
    assert capsys.readouterr().err == "error: shards/[a].tar: truncated\n"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["show", "recipes/none.yaml"], ConfigError.exit_status),
        (["show", "recipes/demo.yaml", "train.step=1"], ConfigError.exit_status),
        (["index", "nowhere"], UserError.exit_status),
        (["export", "nowhere"], UserError.exit_status),
    ],
)
def test_a_command_ends_with_the_status_of_what_is_wrong(
    command: list[str], status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mmopd", *command])
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == status
