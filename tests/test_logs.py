"""Log lines of the launcher, the ranks and the supervisor: one format, which `sort` can merge."""

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmopd.errors import DataError
from mmopd.runtime import logs

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ \S+ .*")

PROCESS = """
import logging, sys, threading, time, warnings
from mmopd.runtime import logs
name, wait = sys.argv[1], float(sys.argv[2])
logs.start(name)
time.sleep(wait)
log = logging.getLogger("mmopd.train.rank")
for step in range(3):
    log.info("step %d\\nof 3", step)
    time.sleep(0.02)
logging.getLogger("a.library").info("not said")
warnings.warn("a warning of a library")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise ValueError("the end")
"""


@pytest.fixture
def quiet() -> Iterator[None]:
    yield
    logging.captureWarnings(False)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the logs of two ranks that wrote at the same time."""
    folder = tmp_path_factory.mktemp("logs")
    files = [folder / f"rank{n}.log" for n in range(2)]
    running = []
    for n, file in enumerate(files):
        with file.open("wb") as out:
            command = [sys.executable, "-c", PROCESS, f"rank{n}", str(0.01 * n)]
            running.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
    assert [process.wait() for process in running] == [1, 1]
    return files


def test_every_line_has_time_level_and_process_those_of_tracebacks_too(written: list[Path]) -> None:
    for n, file in enumerate(written):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if not LINE.fullmatch(line)] == []
        assert {line.split()[2] for line in lines} == {f"rank{n}"}
        said = [logs.message_of(line) for line in lines]
        assert said[:4] == ["step 0", "of 3", "step 1", "of 3"]
        assert said[-1] == "ValueError: the end"
        assert "ZeroDivisionError: division by zero" in said
        assert any("UserWarning: a warning of a library" in line for line in said)
        assert "not said" not in said
        assert {line.split()[1] for line in lines} == {"INFO", "WARNING", "CRITICAL"}


def test_the_logs_of_two_ranks_are_merged_by_sort(written: list[Path]) -> None:
    done = subprocess.run(
        ["sort", "-s", "-k1,1", *map(str, written)], capture_output=True, text=True, encoding="utf-8", check=True
    )
    merged = done.stdout.splitlines()
    assert sorted(merged) == sorted(line for file in written for line in file.read_text(encoding="utf-8").splitlines())
    assert [line.split()[0] for line in merged] == sorted(line.split()[0] for line in merged)
    for n, file in enumerate(written):
        assert [line for line in merged if f" rank{n} " in line] == file.read_text(encoding="utf-8").splitlines()


@pytest.mark.usefixtures("quiet")
def test_the_launchers_file_ends_with_the_error_that_ended_the_run(tmp_path: Path) -> None:
    file = tmp_path / "launcher.log"

    def run() -> None:
        logging.getLogger("mmopd.runtime.progress").info("prepare: begins")
        raise DataError("shards/a.tar: truncated\nwrite the source again")

    with pytest.raises(DataError), logs.to_file(file, "launcher"):
        run()
    logging.getLogger("mmopd").error("after the run")
    said = [line.split(" ", 1)[1] for line in file.read_text(encoding="utf-8").splitlines()]
    assert said == [
        "INFO launcher prepare: begins",
        "ERROR launcher shards/a.tar: truncated",
        "ERROR launcher write the source again",
    ]


def test_last_words_need_no_lock_of_logging() -> None:
    code = (
        "import logging, threading; from mmopd.runtime import logs; logs.start('rank0')\n"
        "logging._acquireLock() if hasattr(logging, '_acquireLock') else logging._lock.acquire()\n"
        "logging.getLogger().handlers[0].acquire()\n"
        "thread = threading.Thread(target=logs.last_words, args=('rank0', 'no progress\\nhere'))\n"
        "thread.start(); thread.join(10)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True, timeout=60
    )
    assert [logs.message_of(line) for line in done.stderr.splitlines()] == ["no progress", "here"]
    assert all(" ERROR rank0 " in line for line in done.stderr.splitlines())


def test_what_a_program_without_our_format_wrote_is_left_as_it_is() -> None:
    assert logs.message_of("(EngineCore pid=7) INFO 11-28 the engine") == "(EngineCore pid=7) INFO 11-28 the engine"
