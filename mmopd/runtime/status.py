"""What a process of a run does now: a small file of the run folder, which `mmopd watch` reads."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mmopd.errors import UserError
from mmopd.runtime.run_folder import make_private

logger = logging.getLogger(__name__)

LAUNCHER = "launcher"  # name of its status file; that of a rank is `rank0`
EVERY = 1.0  # seconds
RUNS, DONE, STOPPED = "", "done", "stopped as asked"  # values of `ended`; others say why
LONGEST = 2000  # characters of a reason


@contextmanager
def telling(path: Path, read: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """Write what `read` returns to a file every second while the block lasts, and then how the block ended.

    A file that cannot be written is said once in the log; the run goes on. `read` is called in a thread.
    """
    over = threading.Event()
    began = time.time()
    said = False

    def write(ended: str) -> None:
        nonlocal said
        about = {"time": time.time(), "began": began, "ended": ended, "host": socket.gethostname(), "pid": os.getpid()}
        try:
            replace(path, json.dumps(about | dict(read())))
        except OSError as error:
            if not said:
                logger.warning("%s cannot be written, so that `mmopd watch` does not see it: %s", path, error)
            said = True

    def go_on() -> None:
        while not over.wait(EVERY):
            with suppress(RuntimeError):  # a dict has grown while it was read: the next second is soon enough
                write(RUNS)

    write(RUNS)
    thread = threading.Thread(target=go_on, name=f"status-{path.stem}", daemon=True)
    thread.start()
    ended = STOPPED
    try:
        yield
        ended = DONE
    except UserError as error:
        ended = str(error)
        raise
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:
        ended = f"{type(error).__name__} {error}".strip()
        raise
    finally:
        over.set()
        thread.join()
        write(ended[:LONGEST])


def replace(path: Path, text: str) -> None:
    """Write a file of the status folder, so that a reader sees the whole of it or the one before."""
    make_private(path.parent)
    part = path.with_suffix(".partial")
    part.write_text(text, encoding="utf-8", errors="replace")
    part.replace(path)
