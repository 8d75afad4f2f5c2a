"""Where a model is served: what a client needs to reach it."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from mmopd.errors import ConfigError

MAX_BYTES = 1 << 20  # of a file of endpoints


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A vLLM server."""

    name: str
    url: str  # base, without a path: http://127.0.0.1:40123
    model: str  # the name it is served under
    api_key: str = field(repr=False)  # empty if the server asks for none
    role: Literal["teacher", "student"]

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that every request needs."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def teacher(self) -> str:
        """Whose replica it is: these are named TEACHER.NUMBER; empty for the student's engine."""
        return self.name.rpartition(".")[0]


def save(path: Path, endpoints: Iterable[Endpoint]) -> None:
    """Write endpoints as JSON that only this user can read, since their keys are in it."""
    path.unlink(missing_ok=True)
    with open(path, "w", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, 0o600)) as file:
        json.dump([asdict(endpoint) for endpoint in endpoints], file, indent=1)


def load(path: Path) -> dict[str, Endpoint]:
    """The endpoints that `save` wrote, by name.

    Raises:
        UserError: there is no such file, others may read it, or it is something else.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file of endpoints; it is there while the servers run") from None
    if status.st_mode & 0o077:
        raise ConfigError(f"{path}: other users may read it, and there are keys in it: chmod 600 {path}")
    if status.st_size > MAX_BYTES:
        raise ConfigError(f"{path}: {status.st_size:,} bytes are no file of endpoints")
    try:
        found = msgspec.json.decode(path.read_bytes(), type=list[Endpoint])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a file of endpoints, as `mmopd serve` writes it: {error}") from None
    return {endpoint.name: endpoint for endpoint in found}


def load_by_role(path: Path) -> tuple[list[Endpoint], dict[str, list[Endpoint]]]:
    """The student's engines, and the replicas of each teacher (named TEACHER.NUMBER), as `save` wrote them.

    Raises:
        UserError: as `load`.
    """
    students: list[Endpoint] = []
    teachers: dict[str, list[Endpoint]] = {}
    for endpoint in load(path).values():
        if endpoint.role == "teacher":
            teachers.setdefault(endpoint.teacher, []).append(endpoint)
        else:
            students.append(endpoint)
    return students, teachers
