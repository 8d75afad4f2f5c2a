"""The path of a unix socket has at most 107 bytes, and a temporary folder may have more."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from uuid import uuid4

import pytest

from mmopd.errors import UserError
from mmopd.runtime import network
from mmopd.runtime.network import SOCKET_BYTES, socket_place
from mmopd.serving.servers import SOCKET_NAME

PROGRAM = """
from mmopd.runtime import python

if __name__ == "__main__":
    process = python.fork_server([]).Process(target=print, args=("it works",))
    process.start()
    process.join()
"""


def test_a_place_is_short_enough_for_the_sockets_of_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as short:
        for length in (SOCKET_BYTES - SOCKET_NAME, SOCKET_BYTES - SOCKET_NAME + 1):
            folder = Path(short, "x" * (length - len(short) - 1))
            folder.mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(folder))
            place = socket_place(SOCKET_NAME)
            assert (place == str(folder)) == (length + SOCKET_NAME <= SOCKET_BYTES)
            with tempfile.TemporaryDirectory(prefix="mmopd-", dir=place) as own, socket.socket(socket.AF_UNIX) as one:
                one.bind(f"{own}/{uuid4()}")
        monkeypatch.setattr(network, "SHORT", str(tmp_path / "not there"))
        with pytest.raises(UserError, match=r"a path of 56 bytes is too long for unix sockets \(at most 55\).*shorter"):
            socket_place(SOCKET_NAME)


def test_processes_can_be_forked_with_a_long_temporary_folder(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")],
        env={**os.environ, "TMPDIR": str(folder)},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.stdout, done.stderr) == ("it works\n", "")
