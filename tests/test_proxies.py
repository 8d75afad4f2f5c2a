"""Proxies of the environment are not asked for model servers; the entry of a server can name one."""

import ast
import asyncio
import dataclasses
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_vllm import FakeVLLM

from mmopd.config import Fleet, Teacher
from mmopd.errors import ConfigError, ServerError
from mmopd.evaluate.runners.lmms import environment
from mmopd.modality import Encoder
from mmopd.preflight.run import preflight
from mmopd.rollout.sync import FileSync
from mmopd.runtime.http import DIRECT, SPELLINGS, proxy_hint
from mmopd.serving import endpoint, readiness
from mmopd.serving.endpoint import UNKNOWN, Endpoint
from mmopd.serving.readiness import Awaited
from mmopd.serving.replicas import ReplicaPool, connect
from mmopd.serving.servers import Servers
from mmopd.task import llm
from mmopd.teacher.fleet import from_files, running_elsewhere

ROOT = Path(__file__).parents[1]
DEAD = "http://127.0.0.1:9"  # nothing listens there
FAR = "http://teacher.invalid:8000"  # no name server knows it: only a proxy can
SCOPES = ("mmopd", "modalities", "data", "eval", "benchmarks")


class Stub:
    """A server of all that our clients ask for; as a proxy, it answers in the place of any server."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                outer.asked.append(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                data = json.dumps(outer.answer(body.decode())).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, body: str) -> dict[str, Any]:
        number = re.search(r"<<<([0-9a-f]{16})", body)
        said = json.dumps({"id": number[1] if number else "", "correct": True})
        choice = {"finish_reason": "stop", "message": {"content": said}}
        return {"data": [{"id": "tiny"}], "weight_version": "step-1", "choices": [choice]}


@pytest.fixture
def stub() -> Iterator[Stub]:
    one = Stub()
    thread = threading.Thread(target=one.server.serve_forever, args=(0.01,))
    thread.start()
    yield one
    one.server.shutdown()
    one.server.server_close()
    thread.join()


@pytest.fixture(params=[*SPELLINGS, "all of them"])
def dead_proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SPELLINGS, *DIRECT):
        monkeypatch.delenv(name, raising=False)
    for name in SPELLINGS if request.param == "all of them" else [request.param]:
        monkeypatch.setenv(name, DEAD)


def at(url: str, proxy: str = "") -> Endpoint:
    return Endpoint("t.0", url, "tiny", "k", "teacher", proxy)


def servers_of(one: Endpoint, logs: Path) -> Servers:
    return Servers({"t.0": [one]}, {}, logs, lambda *event: None)


def clients(one: Endpoint, folder: Path) -> dict[str, object]:
    """Ask a server with each of our clients that a teacher outside has."""

    async def scores() -> bytes:
        async with connect() as http:
            pool = ReplicaPool([one], http, timeout=5, patience=1, concurrency=1, counts=Counter())
            return await pool.call(lambda model: b"{}", lambda reply, request_id: reply)

    elsewhere = running_elsewhere("t.0", one.url, None, one.proxy)
    endpoint.save(folder / "endpoints.json", [one])
    fleet = Fleet(teachers={"t": Teacher(model=Path("m"))}, routes=())
    (listed,) = from_files(fleet, [folder / "endpoints.json"])
    judge = llm.judge(f"{one.url}/v1", "wise", timeout=5, attempts=1, proxy=one.proxy)
    return {
        "elsewhere": elsewhere.model,
        "listed": dataclasses.replace(listed, fingerprint=UNKNOWN),
        "pool": json.loads(asyncio.run(scores()))["data"],
        "judge": judge("It is five.", "5").value,
    }


def evaluates(one: Endpoint, monkeypatch: pytest.MonkeyPatch) -> httpx.Response:
    """Ask a server as lmms-eval does, whose client takes proxies from the environment."""
    for name, value in environment(one).items():
        monkeypatch.setenv(name, value)
    with httpx.Client() as client:
        return client.get(os.environ["OPENAI_API_BASE"] + "/models")


@pytest.mark.usefixtures("dead_proxy")
def test_no_client_takes_a_proxy_from_the_environment(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = at(stub.url)
    assert clients(one, tmp_path) == {"elsewhere": "tiny", "listed": one, "pool": [{"id": "tiny"}], "judge": 1.0}
    servers = servers_of(one, tmp_path)
    servers.await_ready(0.0)
    servers.stop()
    with FileSync([Endpoint("student", stub.url, "student", "", "student")]) as link:
        assert link.versions() == ["step-1"]
    assert evaluates(one, monkeypatch).status_code == 200
    assert all(path.startswith("/") for path in stub.asked)


@pytest.mark.usefixtures("dead_proxy")
def test_the_examination_takes_no_proxy_from_the_environment(encoder: Encoder) -> None:
    async def examine() -> list[str]:
        async with FakeVLLM(encoder) as server:
            fleet = Fleet.model_validate(
                {"teachers": {"t": {"endpoints": [server.endpoint.url]}}, "routes": [{"teacher": "t"}]}
            )
            checks = await preflight(fleet, {}, {"t": [server.endpoint]}, encoder, [], max_tokens=4)
            return [check.name for check in checks if check.state != "ok"]

    assert asyncio.run(examine()) == []


@pytest.mark.parametrize(("set_here", "named_elsewhere"), [DIRECT, DIRECT[::-1]])
def test_evaluation_keeps_the_hosts_that_either_spelling_names(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, set_here: str, named_elsewhere: str
) -> None:
    for name in (*SPELLINGS, *DIRECT):
        monkeypatch.setenv(name, DEAD if name in SPELLINGS else "")
    monkeypatch.setenv(set_here, "hub.company")
    monkeypatch.delenv(named_elsewhere)
    assert evaluates(at(stub.url), monkeypatch).status_code == 200
    assert {os.environ[name] for name in DIRECT} == {"hub.company,127.0.0.1"}


def test_an_entry_names_the_proxy_that_leads_to_it(stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SPELLINGS, *DIRECT):
        monkeypatch.setenv(name, DEAD if name in SPELLINGS else "teacher.invalid")
    far = at(FAR, stub.url)
    assert clients(far, tmp_path) == {"elsewhere": "tiny", "listed": far, "pool": [{"id": "tiny"}], "judge": 1.0}
    assert evaluates(far, monkeypatch).status_code == 200
    assert all(path.startswith(FAR) for path in stub.asked)


def test_the_examination_asks_through_the_proxy_of_the_entry(encoder: Encoder) -> None:
    class Proxy(FakeVLLM):
        def _reply(self, line: str, *request: Any) -> tuple[int, bytes]:
            assert f" {FAR}/" in line
            return super()._reply(line.replace(FAR, ""), *request)

    async def examine() -> list[str]:
        async with Proxy(encoder) as server:
            one = Endpoint("t.0", FAR, "tiny", "k", "teacher", server.endpoint.url)
            fleet = Fleet.model_validate(
                {"teachers": {"t": {"endpoints": [FAR], "proxy": one.proxy}}, "routes": [{"teacher": "t"}]}
            )
            checks = await preflight(fleet, {}, {"t": [one]}, encoder, [], max_tokens=4)
            return [check.name for check in checks if check.state != "ok"]

    assert asyncio.run(examine()) == []


@pytest.mark.parametrize(
    "proxy", ["proxy.company:3128", "http://", "http://proxy", "socks5://p:1080", "http://p:port", "http://u:w@p:3128"]
)
def test_a_proxy_that_cannot_work_is_refused_where_it_is_named(proxy: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`proxy` has the form http://HOST:PORT") as error:
        Teacher(endpoints=(FAR,), proxy=proxy)
    assert "u:w" not in str(error.value.errors()[0]["msg"])  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="`proxy` has the form"):
        llm.judge(FAR, "wise", proxy=proxy)
    endpoint.save(tmp_path / "one.json", [at(FAR, proxy)])
    with pytest.raises(ConfigError, match=r"one\.json: t\.0: `proxy` has the form http://HOST:PORT"):
        endpoint.load(tmp_path / "one.json")


def test_a_teacher_that_mmopd_serves_has_no_proxy() -> None:
    with pytest.raises(ValueError, match="`proxy` is for `endpoints`"):
        Teacher(model=Path("m"), proxy="http://proxy:3128")


def test_a_teacher_that_does_not_answer_says_which_proxy_was_asked_or_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in SPELLINGS:
        monkeypatch.delenv(name, raising=False)
    assert proxy_hint() == ""
    monkeypatch.setenv("HTTPS_PROXY", DEAD)
    with pytest.raises(ServerError, match=r"HTTPS_PROXY is not used for model servers: set `proxy` of this teacher"):
        running_elsewhere("t.0", DEAD, None)
    with pytest.raises(ServerError, match=rf"asked through the proxy {DEAD}"):
        running_elsewhere("t.0", FAR, None, DEAD)


class Refuses(httpx.BaseTransport):
    """A network in which a request has one fate."""

    def __init__(self, fate: Exception | httpx.Response) -> None:
        self.fate = fate

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if isinstance(self.fate, Exception):
            raise self.fate
        return self.fate


def because(cause: OSError) -> httpx.ConnectError:
    error = httpx.ConnectError(str(cause))
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("fate", "reason"),
    [
        (because(ConnectionRefusedError(111, "Connection refused")), "nothing listens at this address"),
        (because(PermissionError(1, "Operation not permitted")), "a firewall or the network"),
        (because(OSError(113, "No route to host")), "a firewall or the network"),
        (httpx.ConnectTimeout("timed out"), "a firewall drops them"),
        (httpx.Response(503, headers={"Via": "squid"}), r"status 503 \(Via: squid\).* a proxy or another program"),
        (httpx.Response(200, text="<html>"), "a proxy or another program"),
        (httpx.Response(200, json={"data": [{"id": "other"}]}), "serves other, not tiny: .*--served-model-name"),
        (httpx.RemoteProtocolError("illegal reply"), "RemoteProtocolError: illegal reply"),
    ],
)
def test_a_server_that_says_it_is_ready_and_cannot_be_reached_is_named_with_the_reason(
    fate: Exception | httpx.Response, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "PATIENCE", 0.2)
    log = tmp_path / "t.0.log"
    log.write_text("INFO: Application startup complete.\n", encoding="utf-8")  # of an earlier start
    servers = servers_of(at(DEAD), tmp_path)
    servers._http = httpx.Client(transport=Refuses(fate))
    with pytest.raises(ServerError, match=r"server 't\.0' is not ready, .* not grown for 0 s \(.*" + reason):
        servers.await_ready(0.0)
    servers._on_event = lambda *event: log.write_text("INFO: Application startup complete.\n" * 2, encoding="utf-8")
    with pytest.raises(ServerError, match=r"t\.0\.log that it is ready, but cannot be reached: .*" + reason):
        servers.await_ready(float("inf"))
    servers.stop()


def test_a_server_that_is_only_slow_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "PATIENCE", 0.0)
    awaited = Awaited([at(DEAD)], tmp_path / "t.0.log")
    (tmp_path / "t.0.log").write_text("Application startup complete.\n", encoding="utf-8")
    assert not awaited.ready(httpx.Client(transport=Refuses(httpx.ReadTimeout("timed out"))))
    assert awaited.read_log().startswith("answering its first request, ")
    assert not awaited.unreachable()
    assert awaited.reason == "it accepts connections, but does not answer"


def test_all_http_clients_are_made_in_one_place() -> None:
    makers = {"Client", "AsyncClient", "get", "post", "put", "patch", "delete", "request", "stream", "ClientSession"}
    found = []
    for path in (path for scope in SCOPES for path in (ROOT / scope).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                bad = bool(modules & {"requests", "urllib3", "http.client"})
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
                bad = node.func.attr == "urlopen" or (owner in {"httpx", "aiohttp"} and node.func.attr in makers)
            else:
                continue
            found += [f"{path.relative_to(ROOT)}:{node.lineno}"] if bad else []
    assert {line.partition(":")[0] for line in found} == {"mmopd/runtime/http.py"}, found
