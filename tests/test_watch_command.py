"""`mmopd watch` as a command, and the page of `mmopd train --watch`: each a process of its own."""

import io
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from rich.console import Console
from run_folders import write_run

from mmopd.commands.watch import watching
from mmopd.runtime.http import client
from mmopd.runtime.run_folder import RunFolder

URL = re.compile(r"watch: (http://127\.0\.0\.1:\d+/\S+/)\n")
PATIENCE = 120.0  # seconds


def answer(url: str) -> httpx.Response:
    """Return the answer to a request for the page, once it is served."""
    begin = time.monotonic()
    with client(timeout=PATIENCE) as http:
        while True:
            try:
                return http.get(url)
            except httpx.ConnectError:
                assert time.monotonic() < begin + PATIENCE
                time.sleep(0.1)


def test_the_command_prints_the_url_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    command = [sys.executable, "-u", "-m", "mmopd", "watch", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8") as process:
        assert process.stdout is not None
        found = URL.fullmatch(process.stdout.readline())
        assert found is not None
        assert re.search(r"ssh -L (\d+):127\.0\.0\.1:\1 \S+", process.stdout.readline())
        page = answer(found[1])
        assert (page.status_code, "<h1" in page.text) == (200, True)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "stopped\n"
    assert process.returncode == 0


def test_a_folder_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmopd", "watch", str(tmp_path)], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 2
    assert f"{tmp_path}: not a run folder" in done.stderr


def test_the_page_of_a_run_lasts_as_long_as_its_block(tmp_path: Path) -> None:
    run = RunFolder(write_run(tmp_path / "run"))
    run.logs.mkdir()
    said = io.StringIO()
    with watching(run, Console(file=said)):
        found = URL.fullmatch(said.getvalue())
        assert found is not None
        assert answer(f"{found[1]}state").json()["name"] == "run"
    with client() as http:
        try:
            http.get(found[1])
        except httpx.ConnectError:
            pass
        else:
            raise AssertionError("it is still served")
    assert "warning" not in said.getvalue()
    assert found[1].split("/")[-2] not in (run.logs / "watch.log").read_text(encoding="utf-8"), "the token is in a log"
