"""Python processes that import nothing from the folder in which they are started.

`python -m` and `python -c` look for modules in the current folder first. A `random.py` or `types.py` that a user keeps
there would be run by servers, ranks and verifiers. Every Python process of mmopd is started by way of this module, and
what it starts in turn inherits the environment. Plug-ins are loaded by their path.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmopd.runtime.network import socket_place

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

SOCKET_NAME = len("/pymp-xxxxxxxx/listener-xxxxxxxx")  # bytes, of multiprocessing
SAFE_PATH = "PYTHONSAFEPATH"


def command(*arguments: str) -> list[str]:
    """Return the command of a Python process; it needs `environment`, too."""
    return [sys.executable, "-P", *arguments]


def environment() -> dict[str, str]:
    """Return the variables that hold for a Python process and for all that it starts.

    Files and output are UTF-8 in any locale: vLLM reads its own files in the encoding of the locale, and mmopd reads
    the output from logs.
    """
    found = {SAFE_PATH: "1", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    if path := os.environ.get("PYTHONPATH"):
        # An empty entry, as in `/some/modules:`, means the current folder.
        found["PYTHONPATH"] = os.pathsep.join(filter(None, path.split(os.pathsep)))
    return found


def fork_server(preload: Sequence[str]) -> "ForkServerContext":
    """Return a context whose processes are forked from one that has imported the modules `preload`."""
    import multiprocessing
    import tempfile
    from multiprocessing import forkserver, util

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    own, tempfile.tempdir = tempfile.tempdir, socket_place(SOCKET_NAME)
    try:
        util.get_temp_dir()  # makes the folder of the process's sockets, once
    finally:
        tempfile.tempdir = own
    before = {name: os.environ.get(name) for name in environment()}
    os.environ.update(environment())  # the process, and the resource tracker before it, take it from here
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ[name] = value or ""
            if value is None:
                del os.environ[name]
    return context
