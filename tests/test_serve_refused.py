"""Servers that cannot start say why, with the key to change, and leave no process."""

import shutil
import socket
from pathlib import Path

import psutil
import pytest

from mmopd.config import Engine
from mmopd.errors import UserError
from mmopd.runtime.processes import Children
from mmopd.serving import endpoint
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.servers import serve
from mmopd.serving.specs import ServerSpec

ENGINE = Engine(dtype="float32", max_model_len=256, max_num_seqs=8, kv_cache_mib=32)


def refused(spec: ServerSpec, logs: Path) -> str:
    """Return the message with which a server is refused, and check that no process is left."""
    with Children() as children, pytest.raises(UserError) as error, serve([spec], children, logs, lambda *event: None):
        pass
    assert not any(child.alive for child in children)
    return str(error.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "the folder has no config.json" in refused(ServerSpec("x", tmp_path, ENGINE, updatable=False), tmp_path)


def test_a_port_that_is_taken_is_named_with_its_key(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(ServerSpec("x", model, ENGINE.model_copy(update={"port": port}), updatable=False), tmp_path)
    assert str(port) in message
    assert "engine.port" in message


def test_memory_that_is_short_is_said_with_what_is_needed(model: Path, tmp_path: Path) -> None:
    message = refused(
        ServerSpec("x", model, ENGINE.model_copy(update={"kv_cache_mib": 10**9}), updatable=False), tmp_path
    )
    assert "KV cache 1,000,000,000" in message
    assert f"{psutil.virtual_memory().available >> 30:,}"[:1] in message
    assert "engine.kv_cache_mib" in message


@pytest.mark.usefixtures("server")
def test_a_server_that_dies_during_start_shows_its_last_words(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    message = refused(ServerSpec("broken", broken, ENGINE, updatable=False), tmp_path)
    assert "'broken' ended" in message
    assert str(tmp_path / "broken.log") in message
    assert "SafetensorError" in message


def test_endpoints_are_written_for_this_user_alone(tmp_path: Path) -> None:
    path, one = tmp_path / "endpoints.json", Endpoint("a", "http://127.0.0.1:1", "m", "secret", "teacher")
    endpoint.save(path, [one])
    assert path.stat().st_mode & 0o777 == 0o600
    assert endpoint.load(path) == {"a": one}
    assert "secret" not in repr(one)
