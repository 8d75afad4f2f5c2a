"""Servers of a fleet file: those to start here, and those that run elsewhere.

`mmopd serve` runs a fleet without a training run.
"""

import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import httpx
from rich.console import Console

from mmopd.config import Fleet
from mmopd.errors import ConfigError, ServerError
from mmopd.runtime.fingerprint import Fingerprint
from mmopd.runtime.http import client, proxy_hint
from mmopd.runtime.network import HOST, is_loopback, public_url
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.serving.endpoint import Endpoint, load
from mmopd.serving.servers import Servers, serve_in_stage
from mmopd.serving.specs import ServerSpec, to_specs
from mmopd.settings_file import suggest


@contextmanager
def serve_fleet(
    fleet: Fleet,
    children: Children,
    logs: Path,
    stages: Stages,
    *,
    elsewhere: Sequence[Endpoint] = (),
    also: Sequence[ServerSpec] = (),
    host: str = HOST,
) -> Iterator[Servers]:
    """Yield every replica of every teacher by name (TEACHER.NUMBER), served here or running elsewhere.

    The servers started here run until the block ends.

    Args:
        fleet: the teachers.
        children: owner of the server processes.
        logs: folder of the servers' logs.
        stages: where the start is shown.
        elsewhere: endpoints of teachers that are not served here, for example from `from_files`.
        also: more servers to start, such as the student's engine.
        host: address that the servers started here listen on; their URLs are those for other machines.

    Raises:
        UserError: same cases as `running_elsewhere`, `to_specs` and `serve`.
    """
    elsewhere = list(elsewhere)
    known = {endpoint.teacher for endpoint in elsewhere}
    for name, teacher in fleet.teachers.items():
        if name not in known:
            elsewhere += [
                running_elsewhere(f"{name}.{i}", url, teacher.api_key_env, teacher.proxy)
                for i, url in enumerate(teacher.endpoints)
            ]
    with serve_in_stage([*also, *to_specs(fleet, known)], children, logs, stages, host=host) as servers:
        servers.update(
            {
                name: dataclasses.replace(endpoint, url=public_url(endpoint.url, host))
                for name, endpoint in servers.items()
            }
        )
        servers.update({endpoint.name: endpoint for endpoint in elsewhere})
        yield servers


class Standing:
    """Servers that stay up from one run to the next if the next run needs the same ones.

    Large teachers take minutes to load.

    Args:
        children: owner of their processes.
        logs: folder of their logs.
        stages: where their starts and deaths are shown.
    """

    def __init__(self, children: Children, logs: Path, stages: Stages) -> None:
        self._children = children
        self._logs = logs
        self._stages = stages
        self._up = ExitStack()
        self._servers: Servers | None = None
        self._of: tuple[Fleet, list[ServerSpec]] | None = None  # what the running servers serve

    def __enter__(self) -> "Standing":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._servers = None
        self._up.close()

    @contextmanager
    def serve(self, fleet: Fleet, students: list[ServerSpec]) -> Iterator[Servers]:
        """Yield the servers of a fleet and a student; they stay up if the block ends without an exception.

        A student that was already up has the weights that it was last given.

        Raises:
            UserError: same cases as `serve_fleet`.
        """
        # Only weights that are sent as files can be reset without a GPU; the GPUs belong to the ranks.
        if (
            self._servers is None
            or (fleet, students) != self._of
            or any(student.sync != "file" for student in students)
        ):
            self._stop()
            self._logs.mkdir(parents=True, exist_ok=True)
            self._servers = self._up.enter_context(
                serve_fleet(fleet, self._children, self._logs, self._stages, also=students)
            )
            self._of = fleet, students
        self._servers.restarts.clear()
        try:
            yield self._servers
        except BaseException:
            self._stop()  # their state is unknown
            raise


def from_files(fleet: Fleet, files: Sequence[Path]) -> list[Endpoint]:
    """Return the endpoints of teachers in files that `mmopd serve` wrote, after asking each server for its models.

    A teacher in several files has the replicas of all of them.

    Raises:
        ConfigError: a file cannot be used, or the fleet has no such teacher; the message names the file.
        ServerError: a server does not answer.
    """
    found: dict[str, list[Endpoint]] = {}
    for path in files:
        for endpoint in load(path).values():
            if endpoint.teacher not in fleet.teachers:
                raise ConfigError(
                    f"{path}: the fleet has no teacher "
                    f"{endpoint.teacher or endpoint.name!r}{suggest(endpoint.teacher, fleet.teachers)}"
                )
            models = _models(endpoint, f"{path}: {endpoint.name}")
            if endpoint.model not in models:
                raise ServerError(
                    f"{path}: {endpoint.name}: {endpoint.url} serves {', '.join(models)}, not {endpoint.model!r}"
                )
            known = endpoint.fingerprint if endpoint.fingerprint.hashed else models[endpoint.model]
            found.setdefault(endpoint.teacher, []).append(dataclasses.replace(endpoint, fingerprint=known))
    return [
        dataclasses.replace(one, name=f"{teacher}.{i}")
        for teacher, group in found.items()
        for i, one in enumerate(group)
    ]


def running_elsewhere(name: str, url: str, key_variable: str | None, proxy: str = "") -> Endpoint:
    """Return an endpoint of the fleet file, with the model that the server reports.

    Raises:
        ConfigError: the variable with its key is not set.
        ServerError: the server does not answer.
    """
    key = key_in(key_variable, f"teacher {name}", "api_key_env") if key_variable else ""
    found = Endpoint(name, url.rstrip("/").removesuffix("/v1"), "", key, "teacher", proxy)
    model, fingerprint = next(iter(_models(found, f"teacher {name}").items()))
    return dataclasses.replace(found, model=model, fingerprint=fingerprint)


def key_in(variable: str, owner: str, setting: str) -> str:
    """Return the API key that an environment variable holds.

    Raises:
        ConfigError: the variable is not set, or its value cannot be a key; the message does not show the value.
    """
    key = os.environ.get(variable, "")
    if not key:
        raise ConfigError(f"{owner}: the environment variable {variable} ({setting}) is not set")
    if not re.fullmatch(r"[!-~]+", key):  # other characters cannot go into an HTTP header
        raise ConfigError(
            f"{owner}: the environment variable {variable} ({setting}) contains blanks, line ends or other "
            "characters that a key cannot have"
        )
    return key


def warn_of(host: str, console: Console) -> None:
    """Print a warning that other machines can reach servers on `host`, unless it is a loopback address."""
    if not is_loopback(host):
        advice = "use a private network or a tunnel"
        console.print(
            f"[yellow]warning:[/] others reach --host {host} too; they need the key, and it travels in plain HTTP: "
            f"{advice}"
        )


def _models(endpoint: Endpoint, owner: str) -> dict[str, Fingerprint]:
    """Return the models that a server reports, by name; all that it says of a model is its name and its path."""
    try:
        with client(proxy=endpoint.proxy, headers=endpoint.headers, timeout=30) as http:
            reply = http.get(f"{endpoint.url}/v1/models")
        if reply.status_code in {401, 403}:
            raise ServerError(f"{owner}: {endpoint.url} rejects the API key (status {reply.status_code})")
        models = {
            str(model["id"]): Fingerprint(f"{model['id']} ({model['root']})" if model.get("root") else str(model["id"]))
            for model in reply.raise_for_status().json()["data"]
        }
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise ServerError(
            f"{owner}: {endpoint.url} does not answer as a vLLM server ({type(error).__name__}: {error})"
            + (f"; asked through the proxy {endpoint.proxy}" if endpoint.proxy else proxy_hint())
        ) from error
    if not models:
        raise ServerError(f"{owner}: {endpoint.url} serves no model")
    return models
