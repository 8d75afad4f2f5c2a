"""HTTP of a served model without its key: nothing is upgraded, held or kept in memory. An app stands for vLLM's."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from waiting import wait_for

from mmopd.serving import guarded_http
from mmopd.serving.supervisor import KEY_VARIABLE, RequireKey

KEY = "key-of-this-test"
REFUSED = b"HTTP/1.1 401 "


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    assert scope["type"] == "http"
    body = b""
    more = True
    while more:
        event = await receive()
        body += event["body"]
        more = event["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, KEY)
        patch.setattr(guarded_http, "HEAD_WITHIN", 0.5)
        app = RequireKey(echo)
        config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off", **guarded_http.settings())
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
        thread.start()
        wait_for(lambda: server.started)
        yield int(server.servers[0].sockets[0].getsockname()[1])
        server.should_exit = True
        thread.join()


def said(connection: socket.socket) -> bytes:
    """Return all that the server says until it closes the connection."""
    answer = b""
    connection.settimeout(20)
    try:
        while more := connection.recv(65536):
            answer += more
    except ConnectionResetError:  # it closed before all that we had sent was read
        pass
    return answer


def request(*headers: bytes, line: bytes = b"GET /v1/models HTTP/1.1") -> bytes:
    return b"\r\n".join([line, b"host: me", *headers, b"", b""])


@pytest.mark.parametrize("path", [b"/", b"/v1/realtime", b"/nothing"])
@pytest.mark.parametrize("key", [b"", b"authorization: Bearer wrong"])
def test_a_websocket_without_the_key_is_refused_and_leaves_no_line(
    port: int, path: bytes, key: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    upgrade = [b"connection: Upgrade", b"upgrade: websocket", b"sec-websocket-version: 13"]
    upgrade += [b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA=="] + [key] * bool(key)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(request(*upgrade, line=b"GET " + path + b" HTTP/1.1"))
        assert said(connection).startswith(REFUSED)
    assert not caplog.records


@pytest.mark.parametrize(
    "begin",
    [b"GET / HTTP/1.1\r\nx: ", b"GET /", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10],
    ids=["value", "path", "many"],
)
@pytest.mark.parametrize("more", [b"a", b"a: b\r\n"])
def test_headers_are_bounded_before_they_are_complete(port: int, begin: bytes, more: bytes) -> None:
    sent = 0
    block = more * (65536 // len(more))
    with socket.create_connection(("127.0.0.1", port)) as connection:
        try:
            connection.sendall(begin)
            for _ in range(1600):  # 100 MB
                sent += connection.send(block)
        except OSError:  # the server has closed the connection
            pass
        else:
            pytest.fail("100 MB of headers were taken")
    assert sent < 20 << 20  # what the kernel holds for both sides


def test_the_limit_is_said(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nx: " + b"a" * guarded_http.MAX_HEAD)
        assert said(connection).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "sent", [b"", b"\r\n", b"G", b"GET / HTTP/1.1\r\nhost: me\r\n"], ids=["nothing", "blank", "letter", "half"]
)
def test_a_connection_without_a_request_is_closed(port: int, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(sent)
        begin = time.monotonic()
        assert said(connection) == b""
        assert time.monotonic() - begin < 15


def test_a_head_that_drips_is_closed(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(200):
            try:
                connection.sendall(b"a: b\r\n")
            except OSError:
                break
            time.sleep(0.05)
        else:
            pytest.fail("a header every 0.05 s kept the connection open for 10 s")


def test_a_body_without_the_key_is_not_read(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(request(b"content-length: 1000000000000", line=b"POST / HTTP/1.1"))
        assert said(connection).startswith(REFUSED)


def test_with_the_key_bodies_are_whole_and_a_connection_serves_several_requests(port: int) -> None:
    body = b"x" * (8 << 20)
    key = f"authorization: Bearer {KEY}".encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(20)
        for _ in range(3):
            connection.sendall(request(key, b"content-length: %d" % len(body), line=b"POST / HTTP/1.1") + body)
            answer = b""
            while len(answer) < len(body) or not answer.endswith(b"x"):
                answer += connection.recv(1 << 20)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.partition(b"\r\n\r\n")[2] == body
            time.sleep(0.6)  # longer than the time for a head, shorter than the server's wait for the next request
        connection.sendall(b"\r\n")  # the beginning of nothing
        assert said(connection) == b""
