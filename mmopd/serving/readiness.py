"""Readiness of a server: ask it, read from its log how far it is, and find the reason if it cannot be reached although
it says that it is ready.
"""

import errno
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from mmopd.serving.endpoint import Endpoint

SAYS_READY = b"Application startup complete."  # uvicorn, before it accepts the first request
PATIENCE = 20.0  # seconds; a server that says it is ready answers within milliseconds
# Phase of the start of vLLM 0.32 after it has logged these words. Both model runners and the CPU's are covered.
PHASES = {
    b"Resolved architecture": "starting the engine",
    b"Starting to load model": "loading weights",
    b"Loading model from scratch": "loading weights",
    b"Model loading took": "profiling memory",
    b"Using cache directory": "compiling",
    b"KV cache size": "warming up, capturing graphs",
    b"init engine (": "starting the API server",
    SAYS_READY: "answering its first request",
}


class Awaited:
    """A server that does not answer yet.

    Args:
        endpoints: of the server; it is ready when it serves the models of all.
        log: of the server; it may have lines of an earlier start, which do not count.

    Attributes:
        since: time on the monotonic clock since which it is awaited.
        heard: time when its log had grown last.
        begin: bytes of its log that are from earlier starts.
        reason: why it was not ready when it was last asked.
    """

    def __init__(self, endpoints: Sequence[Endpoint], log: Path) -> None:
        self.since = self.heard = time.monotonic()
        self.reason = "it has not been asked"
        self._endpoints = endpoints
        self._log = log
        self.begin = self._read = self._size = log.stat().st_size if log.is_file() else 0
        self._busy = False
        self._phase = "importing"
        self._phase_since = self.since
        self._said_ready: float | None = None  # time when that line was found in the log

    def ready(self, http: httpx.Client) -> bool:
        """Ask the server; return true if it is ready."""
        self._busy = False
        try:
            self.reason = next(filter(None, (_reason(http, endpoint) for endpoint in self._endpoints)), "")
        except httpx.ReadTimeout:
            self._busy = True
            self.reason = "it accepts connections, but does not answer"
        return not self.reason

    def read_log(self) -> str:
        """Read what its log has gained; return what it does now, and for how many seconds."""
        size = self._log.stat().st_size if self._log.is_file() else 0
        if size != self._size:
            self._size = size
            self.heard = time.monotonic()
            with self._log.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            self._read += new.rfind(b"\n") + 1  # the rest of a line is read again
            if SAYS_READY in new:
                self._said_ready = self.heard
            words = max(PHASES, key=new.rfind)
            if words in new and PHASES[words] != self._phase:
                self._phase = PHASES[words]
                self._phase_since = self.heard
        return f"{self._phase}, {time.monotonic() - self._phase_since:.0f} s"

    def unreachable(self) -> bool:
        """Return true if its log has said for `PATIENCE` that it is ready, and it refused when it was last asked.

        A server that is only slow, on a busy machine, is waited for.
        """
        late = self._said_ready is not None and time.monotonic() - self._said_ready > PATIENCE
        return late and not self._busy


def _reason(http: httpx.Client, endpoint: Endpoint) -> str:
    """Return why a server is not ready; empty if it is.

    Raises:
        httpx.ReadTimeout: it is connected, and does not answer in time.
    """
    try:
        for path in ("health", "v1/models"):
            reply = http.get(f"{endpoint.url}/{path}", headers=endpoint.headers)
            if reply.status_code != 200:
                return _other(endpoint, reply)
        models = [str(model["id"]) for model in reply.json()["data"]]
    except httpx.ReadTimeout:
        raise
    except httpx.HTTPError as error:
        return f"{endpoint.url}: {_of(error)}"
    except (KeyError, TypeError, ValueError):
        return _other(endpoint, reply)
    if endpoint.model not in models:
        served = ", ".join(models)
        return f"{endpoint.url} serves {served}, not {endpoint.model}: look for --served-model-name in extra_args"
    return ""


def _other(endpoint: Endpoint, reply: httpx.Response) -> str:
    """Return the reason for a reply that is not of a vLLM server with our key."""
    named = ", ".join(f"{name}: {reply.headers[name]}" for name in ("Server", "Via") if name in reply.headers)
    who = f" ({named})" if named else ""
    return (
        f"{reply.request.url} answers with status {reply.status_code}{who}, not as this server: a proxy or another "
        f"program answers in its place. Ask `curl -v --noproxy '*' {endpoint.url}/health`, and set engine.port to a "
        "port that nothing else uses"
    )


def _of(error: httpx.HTTPError) -> str:
    """Return what an error of a connection says about its cause, and what to look at."""
    cause: BaseException | None = error
    number = None
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) and cause.errno else number
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.ConnectTimeout):
        return "packets get no answer: a firewall drops them. Allow connections to this address"
    if number == errno.ECONNREFUSED:
        return "nothing listens at this address: look for --host, --port and --uds in extra_args, and at --host"
    if number in {errno.EACCES, errno.EPERM, errno.EHOSTUNREACH, errno.ENETUNREACH}:
        return f"a firewall or the network does not let this machine connect ({error}). Allow it, or use another --host"
    return f"{type(error).__name__}: {error}".rstrip(": ")
