"""What is known of each logger of a run, in RUN/loggers/NAME.json. The process of the logger writes it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

FOLDER = "loggers"


@dataclass
class State:
    """How far a logger is, and what failed."""

    id: str = ""  # of the run at the service
    steps: int = 0  # sent so far
    failed: int = 0  # calls that failed or took too long
    error: str = ""  # the latest


def load(path: Path) -> State:
    """Return a state; that of a new logger if there is no file, or a damaged one, which counts as a failure."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=State) if path.is_file() else State()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return State(failed=1, error=f"{path.name} is damaged ({error}): the logger starts a new run")


def save(path: Path, state: State) -> None:
    """Write a state, so that a reader sees the whole of it or the one before."""
    part = path.with_suffix(".partial")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(asdict(state))))
    Path(part).replace(path)


def states(run: Path) -> Mapping[str, State]:
    """Return the state of each logger of a run folder, by name."""
    return {path.stem: load(path) for path in sorted((run / FOLDER).glob("*.json"))}
