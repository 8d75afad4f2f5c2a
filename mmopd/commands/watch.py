"""`mmopd watch` and `mmopd train --watch`: serve the page of runs that go on, or have ended."""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from mmopd.runtime import python
from mmopd.runtime.causes import why
from mmopd.runtime.network import free_port
from mmopd.runtime.processes import Children
from mmopd.runtime.run_folder import RunFolder
from mmopd.watch.server import TOKEN_VARIABLE, application, listen, new_token, serve, url


def watch(runs: Sequence[Path], port: int, console: Console) -> None:
    """Serve the page of these run folders until Ctrl-C.

    Raises:
        UserError: a folder is not that of a run, there are too many, or the port is taken.
    """
    token = new_token()
    app = application(runs, token)
    with listen(port) as listening:
        port = listening.getsockname()[1]
        _say(console, f"watch: {url(port, token)}")
        _say(console, f"Ctrl-C ends it. From another machine: ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}")
        serve(app, listening)


@contextmanager
def watching(run: RunFolder, console: Console) -> Iterator[None]:
    """Serve the page of a run from a process of its own while the block lasts; the run does not depend on it."""
    token, port = new_token(), free_port()
    command = python.command("-m", "mmopd.watch.server", str(port), str(run.root))
    with Children() as children:
        page = children.start("watch", command, run.logs / "watch.log", {TOKEN_VARIABLE: token})
        _say(console, f"watch: {url(port, token)}")
        try:
            yield
        finally:
            if not page.alive:
                _say(console, f"warning: the page is not served any more; {why(page.log, page.begin)}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
