"""What the processes of a run say that they do now: the files that `mmopd.runtime.status` writes."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mmopd.report.run_files import LeftOut, short
from mmopd.runtime.run_folder import RunFolder
from mmopd.runtime.status import DONE, EVERY, LAUNCHER, RUNS

SILENT = 15 * EVERY  # seconds without a sign of life after which a process is taken for dead
LARGEST = 1 << 20  # bytes of a status file
RANKS = 1024


class Replica(msgspec.Struct):
    """A server as one rank sees it."""

    name: str
    in_flight: int
    answered: int
    faults: int
    median: float | None
    late: float | None
    blocked: float


class Pool(msgspec.Struct):
    """The replicas of a model as one rank sees them."""

    waiting: int
    replicas: list[Replica]


class Process(msgspec.Struct, kw_only=True):
    """What all processes say."""

    time: float
    began: float
    ended: str


class Launcher(Process, kw_only=True):
    """What `mmopd train` does; `mmopd.runtime.progress.Stages.now` writes it."""

    seconds: dict[str, float] = {}
    servers: dict[str, str] = {}
    left: str = ""
    stage: str = ""
    elapsed: float = 0.0
    done: int = 0
    count: int = 0
    note: str = ""


class Rank(Process, kw_only=True):
    """What a training process does."""

    doing: str
    pools: list[Pool] = []


@dataclass(frozen=True, slots=True)
class Now:
    """What a run does now."""

    launcher: Launcher | None
    silent: float  # seconds since the launcher's last sign of life; 0 if it has ended
    ranks: dict[str, tuple[Rank, float]]  # by name, with the seconds since the last sign

    @property
    def state(self) -> str:
        """State in a word: unknown | running | silent | done | failed."""
        if self.launcher is None:
            return "unknown"
        if self.launcher.ended == RUNS:
            return "running" if self.silent < SILENT else "silent"
        return "done" if self.launcher.ended == DONE else "failed"


P = TypeVar("P", bound=Process)


class Statuses:
    """Reads the status files of a run."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._seen: dict[Path, tuple[float, float]] = {}  # the last time in a file, and when it was first read here

    def read(self, left_out: LeftOut) -> Now:
        """Return what the run does now; files that cannot be read are named in `left_out`."""
        path = self._run.status_of(LAUNCHER)
        launcher = self._load(path, Launcher, left_out)
        silent = self._silence(path, launcher) if launcher is not None else 0.0
        ranks = {}
        for path in sorted(self._run.status.glob("rank*.json"), key=_number)[:RANKS]:
            rank = self._load(path, Rank, left_out)
            if rank is not None and (launcher is None or rank.time >= launcher.began):  # else of an earlier part
                ranks[path.stem] = rank, self._silence(path, rank)
        return Now(launcher, silent, ranks)

    def _load(self, path: Path, kind: type[P], left_out: LeftOut) -> P | None:
        name = str(path.relative_to(self._run.root))
        try:
            if not path.is_file():
                if path.is_symlink() or path.exists():
                    left_out.add(name, "not a regular file")
                return None
            if path.stat().st_size > LARGEST:
                raise ValueError(f"more than {LARGEST:,} bytes")
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except FileNotFoundError:
            return None
        except OSError as error:
            left_out.add(name, f"cannot be read: {error.strerror}")
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            left_out.add(name, f"damaged: {error}")
        return None

    def _silence(self, path: Path, process: Process) -> float:
        """Return the seconds since a process last wrote; clocks of two machines are not compared, but for the first."""
        if process.ended != RUNS:
            return 0.0
        now = time.monotonic()
        last, since = self._seen.get(path, (0.0, 0.0))
        if last != process.time:
            since = now if last else now - max(0.0, time.time() - process.time)
            self._seen[path] = process.time, since
        return now - since


def servers(now: Now) -> list[dict[str, Any]]:
    """Return a row for each server: what happened to it, and its requests, added up over the ranks."""
    seen: dict[str, list[Replica]] = defaultdict(list)
    waiting: dict[str, int] = defaultdict(int)
    for rank, _ in now.ranks.values():
        for pool in rank.pools:
            for replica in pool.replicas:
                seen[replica.name].append(replica)
            if pool.replicas:
                waiting[pool.replicas[0].name] += pool.waiting
    happened = now.launcher.servers if now.launcher else {}
    going_on = now.state == "running"
    live = going_on and any(rank.ended == RUNS for rank, _ in now.ranks.values())
    return [
        _server(name, happened, seen[name], waiting.get(name), going_on=going_on, live=live)
        for name in sorted({*seen, *_unshared(happened, seen)}, key=_place)
    ]


def _server(
    name: str, happened: dict[str, str], seen: Sequence[Replica], waiting: int | None, *, going_on: bool, live: bool
) -> dict[str, Any]:
    said = happened.get(name) or next((what for one, what in happened.items() if name in _shares(one)), "")
    blocked = max((replica.blocked for replica in seen), default=0.0)
    busy = sum(replica.in_flight for replica in seen)
    if not going_on:
        does, mark = "stopped", "off"
    elif said and not said.startswith("ready"):
        does, mark = said, "warning"
    elif live and blocked:
        does, mark = f"no requests for {blocked:.0f} s, after failures in a row", "warning"
    else:
        does, mark = ("answering" if live and busy else "idle"), "good"
    medians = [replica.median for replica in seen if replica.median is not None]
    return {
        "name": short(name),
        "does": short(does),
        "said": short(said),
        "mark": mark,
        "in_flight": busy if live else None,
        "waiting": waiting if live else None,
        "median": sorted(medians)[len(medians) // 2] if medians else None,
        "late": max((replica.late for replica in seen if replica.late is not None), default=None),
        "answered": sum(replica.answered for replica in seen),
        "faults": sum(replica.faults for replica in seen),
        "asked": bool(seen),
    }


def _unshared(happened: dict[str, str], seen: dict[str, list[Replica]]) -> list[str]:
    """Return the servers under their own names; one that serves several teachers is shown under theirs, once asked."""
    return [name for name in happened if not (_shares(name) & seen.keys() - {name})]


def _shares(name: str) -> set[str]:
    """Return the names of the replicas that a server of several teachers serves: `a+b.0` serves `a.0` and `b.0`."""
    teachers, _, number = name.rpartition(".")
    return {f"{teacher}.{number}" for teacher in teachers.split("+")} if "+" in teachers else set()


def _place(name: str) -> tuple[bool, str]:
    return not name.startswith("student"), name


def _number(path: Path) -> tuple[int, str]:
    number = path.stem.removeprefix("rank")
    return (int(number) if number.isdecimal() and len(number) < 9 else 10**9), path.stem
