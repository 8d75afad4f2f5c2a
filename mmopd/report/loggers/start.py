"""Start the loggers of a run, say which of them fail, and end them."""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from mmopd.errors import ConfigError
from mmopd.report.loggers import state
from mmopd.report.metrics import read_lines
from mmopd.runtime import python
from mmopd.runtime.processes import Child, Children
from mmopd.runtime.run_folder import RunFolder

logger = logging.getLogger(__name__)

LOOK = 5.0  # seconds between looks at the states
LAST = 30.0  # seconds that the loggers have to send the rest, when the run has ended


def check_installed(names: Sequence[str]) -> None:
    """Check that the packages of the loggers are installed.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a folder of that name, such as W&B's files
            raise ConfigError(
                f"loggers: {name} is not installed; `pip install 'mmopd[{name}]'`, or take it out of the recipe's "
                "`loggers`"
            )


@contextmanager
def logging_to(names: Sequence[str], run: RunFolder, console: Console) -> Iterator[None]:
    """Send the run to its loggers while the block lasts; afterwards they have `LAST` seconds for the rest."""
    (run.root / state.FOLDER).mkdir(exist_ok=True)
    said: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK):
            say_failures(run, console, said)

    with Children() as children:
        started = {name: _start(name, run, children) for name in names}
        looking = threading.Thread(target=look, name="loggers", daemon=True)
        looking.start()
        try:
            yield
        finally:
            ended.set()
            children.stop_all(grace=LAST)
            looking.join()
            for name, child in started.items():
                _check_end(name, child, run)
            say_failures(run, console, said)


def say_failures(run: RunFolder, console: Console, said: set[str]) -> None:
    """Print once for each logger that it fails, and log it."""
    for name, now in state.states(run.root).items():
        if now.failed and name not in said:
            said.add(name)
            text = f"logger {name} fails, the run goes on: {now.error} (more in {_log(name, run)})"
            logger.warning("%s", text)
            console.print(f"warning: {text}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _start(name: str, run: RunFolder, children: Children) -> Child:
    command = python.command("-m", "mmopd.report.loggers.follow", name, str(run.root))
    return children.start(f"logger-{name}", command, _log(name, run))


def _check_end(name: str, child: Child, run: RunFolder) -> None:
    """Count a process that had to be killed, or that died."""
    if child.returncode:
        path = run.root / state.FOLDER / f"{name}.json"
        now = state.load(path)
        now.failed += 1
        steps = len(read_lines(run.metrics))
        now.error = f"ended with status {child.returncode}; {now.steps} of {steps} steps are sent"
        state.save(path, now)


def _log(name: str, run: RunFolder) -> Path:
    return run.logs / f"logger-{name}.log"
