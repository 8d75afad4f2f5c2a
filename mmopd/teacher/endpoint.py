"""Where a model is served: what a client needs to reach it."""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal


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


def save(path: Path, endpoints: Iterable[Endpoint]) -> None:
    """Write endpoints as JSON that only this user can read, since their keys are in it."""
    path.unlink(missing_ok=True)
    with open(path, "w", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, 0o600)) as file:
        json.dump([asdict(endpoint) for endpoint in endpoints], file, indent=1)


def load(path: Path) -> dict[str, Endpoint]:
    """The endpoints that `save` wrote, by name."""
    return {record["name"]: Endpoint(**record) for record in json.loads(path.read_text())}
