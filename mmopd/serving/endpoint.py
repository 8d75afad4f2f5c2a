"""Endpoints: what a client needs to reach a served model."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from mmopd.config.fleet import check_proxy
from mmopd.errors import ConfigError
from mmopd.runtime.fingerprint import Fingerprint

MAX_BYTES = 1 << 20  # largest accepted file of endpoints
UNKNOWN = Fingerprint()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A vLLM server."""

    name: str
    url: str  # base URL without a path: http://127.0.0.1:40123
    model: str  # name under which the server offers the model
    api_key: str = field(repr=False)  # empty if the server requires no key
    role: Literal["teacher", "student"]
    proxy: str = ""  # URL of the proxy through which it is reached; proxies of the environment are not used
    fingerprint: Fingerprint = UNKNOWN  # of the model; only `mmopd serve` and clients of its servers know it

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that every request needs."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    @property
    def teacher(self) -> str:
        """The teacher whose replica this is (replicas are named TEACHER.NUMBER); empty for a student's engine."""
        return self.name.rpartition(".")[0]


def save(path: Path, endpoints: Iterable[Endpoint]) -> None:
    """Write endpoints as JSON that only this user can read, because it contains their keys."""
    path.unlink(missing_ok=True)
    with open(path, "w", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, 0o600), encoding="utf-8") as file:
        json.dump([asdict(endpoint) for endpoint in endpoints], file, indent=1)


def load(path: Path) -> dict[str, Endpoint]:
    """Return the endpoints that `save` wrote, by name.

    Raises:
        ConfigError: the file is missing, is readable by other users, or is not a file of endpoints.
    """
    made = "`mmopd serve` writes it, and it exists only while the servers run"
    try:
        status = path.stat()
        if status.st_size > MAX_BYTES:
            raise ConfigError(
                f"{path}: {status.st_size:,} bytes are too many for a file of endpoints (at most {MAX_BYTES:,}): {made}"
            )
        found = msgspec.json.decode(path.read_bytes(), type=list[Endpoint])
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file of endpoints; {made}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; it is the file of `mmopd serve`") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a file of endpoints that `mmopd serve` wrote: {error}") from None
    if status.st_mode & 0o077:
        raise ConfigError(f"{path}: other users can read it, and it contains API keys; run `chmod 600 {path}`")
    for endpoint in found:
        try:
            check_proxy(endpoint.proxy)
        except ValueError as error:
            raise ConfigError(f"{path}: {endpoint.name}: {error}") from None
    return {endpoint.name: endpoint for endpoint in found}


def load_by_role(path: Path) -> tuple[list[Endpoint], dict[str, list[Endpoint]]]:
    """Return the student's engines, and the replicas of each teacher (named TEACHER.NUMBER), from a file of `save`.

    Raises:
        ConfigError: same cases as `load`.
    """
    students: list[Endpoint] = []
    teachers: dict[str, list[Endpoint]] = {}
    for endpoint in load(path).values():
        if endpoint.role == "teacher":
            teachers.setdefault(endpoint.teacher, []).append(endpoint)
        else:
            students.append(endpoint)
    return students, teachers
