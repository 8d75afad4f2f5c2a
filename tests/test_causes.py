"""The cause of an end, in the words of its error: logs as ranks, vLLM and plain programs write them."""

import logging
from pathlib import Path

import pytest

from mmopd.runtime.causes import why
from mmopd.runtime.logs import Lines


def record(level: int, text: str, error: BaseException | None = None) -> str:
    """Return a record of a rank's log."""
    info = (type(error), error, error.__traceback__) if error else None
    return Lines("rank0").format(logging.LogRecord("mmopd", level, "", 0, text, None, info)) + "\n"


def raised(error: Exception) -> Exception:
    try:
        try:
            raise KeyError("the first one")
        except KeyError as first:
            raise error from first
    except Exception as caught:
        return caught


TRACE = 'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\n    x\n    ~\n'
ENGINE, SERVER = "(EngineCore pid=7) ", "(APIServer pid=6) "


def vllm(process: str, text: str, source: str = "") -> str:
    return "".join(f"{process}{source}{line}\n" for line in text.splitlines())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "rank0.log"


def test_an_error_of_the_user_is_shown_whole_and_nothing_else(log: Path) -> None:
    log.write_text(
        record(logging.WARNING, "slow") + record(logging.ERROR, "shard a.tar: cut\nset x to y") + "noise\n",
        encoding="utf-8",
    )
    assert why(log) == f"its error, in {log}:\nshard a.tar: cut\nset x to y"


def test_an_exception_of_a_rank_is_shown_without_its_traceback(log: Path) -> None:
    died = raised(RuntimeError("CUDA error: invalid device ordinal\nSearch for cudaErrorInvalidDevice"))
    log.write_text("noise\n" + record(logging.CRITICAL, "ended by an error", died), encoding="utf-8")
    words = "RuntimeError: CUDA error: invalid device ordinal\nSearch for cudaErrorInvalidDevice"
    assert why(log) == f"its error, in {log}:\n{words}"


def test_the_error_of_an_engine_is_shown_and_not_that_of_its_server_which_refers_to_it(log: Path) -> None:
    cause = f"{TRACE}SafetensorError: the header is cut\n"
    log.write_text(
        vllm(ENGINE, cause, "ERROR 11-30 22:09:57 [core.py:1100] ")
        + vllm(SERVER, f"{TRACE}RuntimeError: Engine core initialization failed. See root cause above. Failed: {{}}")
        + f"{TRACE}SystemExit: 1\n",
        encoding="utf-8",
    )
    assert why(log).endswith(":\nSafetensorError: the header is cut")


def test_a_refused_flag_has_no_exception_and_is_in_the_last_lines(log: Path) -> None:
    log.write_text(
        f"usage: vllm [-h]\n  [--many]\nvllm: error: unrecognized arguments: --no-such-flag\n{TRACE}SystemExit: 2\n",
        encoding="utf-8",
    )
    assert why(log).startswith(f"the last lines of {log}:\n")
    assert "unrecognized arguments: --no-such-flag" in why(log)


def test_an_earlier_start_and_an_error_before_a_signal_are_no_cause(log: Path) -> None:
    log.write_text(record(logging.ERROR, "of yesterday"), encoding="utf-8")
    begin = log.stat().st_size
    log.write_text(log.read_text(encoding="utf-8") + "at step 7\n", encoding="utf-8")
    assert why(log, begin) == f"the last lines of {log}:\nat step 7"
    assert why(log, by_signal=True) == f"the last lines of {log}:\nof yesterday\nat step 7"
    assert why(log.with_name("none")).endswith(":\n(none)")
