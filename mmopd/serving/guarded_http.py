"""HTTP of a served model: bounds on what a client without a key can cost.

uvicorn reads headers of any size with httptools, ends an idle connection only after its first answer, and speaks
websockets. vLLM's flags for header limits (`--h11-...`) apply to uvicorn's slower parser alone.
"""

from asyncio import BaseTransport, TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 << 10  # bytes of a request line with its headers
HEAD_WITHIN = 20.0  # seconds in which a client has to send them, from the connection or the end of the last answer
CLOSING = 5  # seconds for an API server to finish its open requests when it must end


class Guarded(HttpToolsProtocol):
    """A connection whose request lines and headers are bounded in size and time."""

    _timer: TimerHandle | None = None
    _in_head = True
    _head = 0  # bytes of the current head

    def connection_made(self, transport: BaseTransport) -> None:
        """Wait for the first request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head that is not complete, and refuse one that is too long."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._in_head:
            self._head += len(data)
            if self._head > MAX_HEAD:
                self._refuse()
        # Bytes end uvicorn's own wait for the next request.
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._wait()

    def on_message_begin(self) -> None:
        """Begin to count a head."""
        super().on_message_begin()
        self._in_head = True
        self._head = 0

    def on_headers_complete(self) -> None:
        """Stop the count and the wait."""
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def _wait(self) -> None:
        # Closed without an answer: a client whose request was late tries again.
        self._timer = self.loop.call_later(HEAD_WITHIN, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            status = b"431 Request Header Fields Too Large"
            self.transport.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
            self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: anyone could fill the log with requests for websockets."""


def settings() -> dict[str, Any]:
    """Return the arguments of `uvicorn.Config` for a server.

    An engine that dies leaves a call into it (a pause, new weights) unanswered, and its API server would wait forever.
    """
    return {"http": Guarded, "ws": "none", "timeout_graceful_shutdown": CLOSING}
