"""Phases of a server's start, read from its log as vLLM writes it."""

import time
from pathlib import Path

import pytest

from mmopd.serving import readiness
from mmopd.serving.readiness import Awaited

# Lines of vLLM 0.32, of the API server and of the engine, in the order of a start.
PHASES = {
    "INFO [model.py:733] Resolved architecture: Qwen3VLForConditionalGeneration": "starting the engine",
    "INFO [gpu_model_runner.py:5039] Starting to load model /models/x...": "loading weights",
    "INFO [model_runner.py:424] Model loading took 4.1 GiB memory and 6.0 seconds": "profiling memory",
    "INFO [backends.py:1104] Using cache directory: /x for vLLM's torch.compile": "compiling",
    "INFO [kv_cache_utils.py:2327] GPU KV cache size: 32,768 tokens": "warming up, capturing graphs",
    "INFO [core.py:402] init engine (profile, create kv cache, warmup model) took 9 s": "starting the API server",
    "INFO:     Application startup complete.": "answering its first request",
}


def test_a_server_that_starts_says_what_it_does_and_for_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, now = tmp_path / "t.0.log", [100.0]
    monkeypatch.setattr(readiness.time, "monotonic", lambda: now[0])
    log.write_text("\n".join(PHASES) + "\n", encoding="utf-8")  # of an earlier start
    awaited = Awaited([], log)
    assert awaited.read_log() == "importing, 0 s"
    for line, phase in PHASES.items():
        now[0] += 5
        with log.open("a", encoding="utf-8") as file:
            file.write(f"(EngineCore pid=7) {line}\nanother line\n")
        assert awaited.read_log() == f"{phase}, 0 s"
        assert awaited.heard == now[0]
        now[0] += 7
        assert awaited.read_log() == f"{phase}, 7 s"
    assert awaited.heard == now[0] - 7


def test_a_line_counts_when_it_is_whole(tmp_path: Path) -> None:
    log = tmp_path / "t.0.log"
    awaited = Awaited([], log)
    log.write_text("INFO Starting to lo", encoding="utf-8")
    assert awaited.read_log().startswith("importing, ")
    log.write_text("INFO Starting to load model /models/x...\n", encoding="utf-8")
    assert awaited.read_log().startswith("loading weights, ")
    assert time.monotonic() - awaited.heard < 60
