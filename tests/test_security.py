"""Servers that mmopd starts open no unsafe route: tested on the real vLLM as `mmopd serve` starts it."""

import base64
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from PIL import Image

from mmopd.demo.world import build_student
from mmopd.serving import endpoint, guarded_http, wire
from mmopd.serving.endpoint import Endpoint

KEY = "key-of-this-test-4f1d9a"
FLEET = """
teachers:
  plain: {model: model, engine: {dtype: float32, max_model_len: 256, max_num_seqs: 8, kv_cache_mib: 32}}
routes: [{teacher: plain}]
"""
DEVELOPMENT = [
    "/pause",
    "/resume",
    "/update_weights",
    "/start_weight_update",
    "/init_weight_transfer_engine",
    "/collective_rpc",
    "/sleep",
    "/wake_up",
    "/reset_prefix_cache",
    "/reset_mm_cache",
    "/server_info",
    "/v1/load_lora_adapter",
]


class Served(NamedTuple):
    folder: Path
    process: "subprocess.Popen[bytes]"
    teacher: Endpoint


@pytest.fixture(scope="module")
def served(server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Run `mmopd serve` in an environment that would open every route of a vLLM started by hand."""
    folder = tmp_path_factory.mktemp("served")
    build_student(folder / "model", 0)
    (folder / "fleet.yaml").write_text(FLEET, encoding="utf-8")
    env = {
        **os.environ,
        "NODE_KEY": KEY,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "COLUMNS": "200",
    }
    command = [sys.executable, "-m", "mmopd", "serve", "fleet.yaml", "--api-key-env", "NODE_KEY"]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=output, stderr=output)
    try:
        while "Ctrl-C stops." not in (said := (folder / "output").read_text(encoding="utf-8")):
            assert process.poll() is None, said
            time.sleep(0.2)
        yield Served(folder, process, endpoint.load(folder / "endpoints.json")["plain.0"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()


def processes(served: Served) -> list[psutil.Process]:
    return psutil.Process(served.process.pid).children(recursive=True)


def ask(server: Endpoint, url: str, kind: str = "image_url") -> httpx.Response:
    body = {
        "model": server.model,
        "token_ids": [5, 6, 7],
        "content_parts": [{"type": kind, "url": url}],
        "sampling_params": {"max_tokens": 1},
    }
    return httpx.post(server.url + wire.PATH, json=body, headers=server.headers, timeout=60)


def test_nothing_listens_but_on_the_loopback_interface(served: Served) -> None:
    listening = {
        c.laddr.ip for p in processes(served) for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_every_route_wants_the_key(served: Served) -> None:
    paths: dict[str, Any] = httpx.get(f"{served.teacher.url}/openapi.json", headers=served.teacher.headers).json()[
        "paths"
    ]
    assert wire.PATH in paths
    for path in [*paths, "/docs", "/openapi.json", "/nothing"]:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Bearer {KEY}x"},
            {"Authorization": KEY},
        ):
            assert httpx.get(served.teacher.url + path, headers=headers).status_code == 401
            assert httpx.post(served.teacher.url + path, headers=headers).status_code == 401


def test_without_the_key_nothing_is_upgraded_or_held(served: Served) -> None:
    """vLLM's uvicorn has the bounds of `mmopd.serving.guarded_http`, whose own tests are in test_guarded_http.py."""
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "A" * 22 + "==",
    }
    refused = httpx.get(f"{served.teacher.url}/v1/realtime", headers=upgrade)
    assert (refused.status_code, refused.headers["connection"]) == (401, "close")
    assert httpx.get(served.teacher.url, headers={"long": "a" * (1 << 20)}).status_code == 431
    with socket.create_connection(("127.0.0.1", httpx.URL(served.teacher.url).port)) as idle:
        idle.settimeout(guarded_http.HEAD_WITHIN + 20)
        assert idle.recv(100) == b""
    log = (served.folder / "endpoints-logs" / "plain.0.log").read_text(encoding="utf-8")
    assert "Traceback" not in log
    assert "Unsupported upgrade" not in log


@pytest.mark.parametrize("path", DEVELOPMENT)
def test_a_teacher_has_no_development_route(served: Served, path: str) -> None:
    assert httpx.post(served.teacher.url + path, headers=served.teacher.headers, json={}).status_code == 404
    assert httpx.get(served.teacher.url + path, headers=served.teacher.headers).status_code == 404


def test_no_url_is_fetched(served: Served) -> None:
    image = io.BytesIO()
    Image.new("RGB", (32, 32)).save(image, "png")
    (served.folder / "image.png").write_bytes(image.getvalue())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]
        urls = [
            f"{scheme}://{host}:{port}/image.png"
            for scheme in ("http", "https", "HTTP")
            for host in ("127.0.0.1", "localhost")
        ]
        urls += [
            f"http://no%20domain@127.0.0.1:{port}/image.png",
            f"ftp://127.0.0.1:{port}/image.png",
            f"//127.0.0.1:{port}/image.png",
        ]
        for url in urls:
            for kind in ("image_url", "video_url", "audio_url"):
                assert ask(served.teacher, url, kind).status_code >= 400, (url, kind)
        with pytest.raises(BlockingIOError):  # no connection was tried
            listener.accept()
    for url in (
        f"file://{served.folder}/image.png",
        f"file://localhost{served.folder}/image.png",
        str(served.folder / "image.png"),
    ):
        assert ask(served.teacher, url).status_code >= 400
    assert "allowed domains" in ask(served.teacher, urls[0]).text
    inline = "data:image/png;base64," + base64.b64encode(image.getvalue()).decode()
    assert "allowed" not in ask(served.teacher, inline).text  # the form in which images are allowed


def test_the_key_is_in_no_file_and_on_no_command_line(served: Served) -> None:
    commands = [Path(f"/proc/{p.pid}/cmdline").read_bytes() for p in processes(served)]
    assert any(b"mmopd.serving.supervisor" in command for command in commands)
    assert not any(
        KEY.encode() in Path(entry, "cmdline").read_bytes() for entry in Path("/proc").glob("[0-9]*") if readable(entry)
    )
    files = [path for path in served.folder.rglob("*") if path.is_file()]
    assert {"endpoints.json", "output", "servers.log", "plain.0.log"} <= {path.name for path in files}
    arguments = (served.folder / "endpoints-logs" / "plain.0.log").read_text(encoding="utf-8")
    assert re.search(
        r"non-default args: .*allowed_media_domains", arguments
    )  # vLLM's output at its start is checked, too
    assert [path.name for path in files if KEY.encode() in path.read_bytes()] == ["endpoints.json"]
    assert (served.folder / "endpoints.json").stat().st_mode & 0o777 == 0o600


def readable(process: Path) -> bool:
    try:
        return bool((process / "cmdline").read_bytes())
    except OSError:
        return False
