import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import torch
from peft import PeftModel
from served import Question, load_model, make_adapters
from waiting import LIMIT

from mmopd.config import Engine
from mmopd.demo.world import build_student, digit_sums
from mmopd.rollout.sync import BUCKET_BYTES, FRESH, BroadcastSync, FileSync, SyncError, WeightSync
from mmopd.runtime.processes import Children
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.lora import read_adapter
from mmopd.serving.servers import Servers, serve
from mmopd.serving.specs import ServerSpec

ENGINE = Engine(dtype="float32", max_model_len=256, max_num_seqs=8, kv_cache_mib=32)


class Running(NamedTuple):
    servers: Servers
    adapters: Mapping[str, Path]  # adapters of the teacher's server
    children: Children
    logs: Path
    events: Sequence[tuple[str, str]]

    @property
    def student(self) -> Endpoint:
        return self.servers["student"]

    @property
    def teacher(self) -> Endpoint:
        return self.servers["words"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write two students with different weights."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        build_student(folder / str(seed), seed)
    return folder / "0", folder / "1"


@pytest.fixture(scope="module")
def running(server: None, models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    logs, events = tmp_path_factory.mktemp("logs"), list[tuple[str, str]]()
    adapters = make_adapters(models[1], tmp_path_factory.mktemp("adapters"))
    specs = [
        ServerSpec("student", models[0], ENGINE, updatable=True),
        ServerSpec("apart", models[0], ENGINE, updatable=True, sync="broadcast"),
        ServerSpec(
            "teacher",
            models[1],
            ENGINE,
            updatable=False,
            adapters={k: read_adapter(path) for k, path in adapters.items()},
        ),
    ]
    with Children() as children, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mmopd.serving.specs.BATCHED_TOKENS", ENGINE.max_model_len
        )  # one long prompt fills a pass, so the next must wait as a whole
        with serve(specs, children, logs, lambda *event: events.append(event)) as servers:
            yield Running(servers, adapters, children, logs, events)
        assert not any(child.alive for child in children)


def test_readiness_is_told_for_each_server(running: Running) -> None:
    assert [event for event in running.events if event[1] == "starting"] == [
        (name, "starting") for name in ("student", "apart", "teacher")
    ]
    assert {name for name, what in running.events if what.startswith("ready after")} == {"student", "apart", "teacher"}
    running.servers.check()


def test_no_route_is_open_without_the_key(running: Running) -> None:
    for path in (
        "/health",
        "/v1/models",
        "/pause",
        "/resume",
        "/collective_rpc",
        "/update_weights",
        "/inference/v1/generate",
        "/metrics",
    ):
        assert httpx.post(running.student.url + path).status_code == 401
        assert httpx.get(running.student.url + path, headers={"Authorization": "Bearer wrong"}).status_code == 401


def test_only_the_student_can_be_changed(running: Running) -> None:
    for path in ("/pause", "/update_weights", "/collective_rpc"):
        assert httpx.post(running.teacher.url + path, headers=running.teacher.headers).status_code == 404


def test_the_key_is_on_no_command_line_and_in_no_log(running: Running) -> None:
    key = running.student.api_key
    lines = [line for p in descendants(running.children) for line in p.cmdline()]
    assert any("mmopd.serving.supervisor" in line for line in lines)
    assert not any(key in line for line in lines)
    assert not any(key in log.read_text(encoding="utf-8") for log in running.logs.iterdir())


def test_long_prompts_with_seeds_that_arrive_together_are_all_answered(running: Running) -> None:
    def ask(seed: int) -> int:
        sampling = {"max_tokens": 2, "seed": seed, "n": 2, "detokenize": False}
        body = {"token_ids": [5 + seed] * (100 + seed), "sampling_params": sampling}
        url = f"{running.student.url}/inference/v1/generate"
        return httpx.post(url, json=body, headers=running.student.headers, timeout=60).status_code

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, range(24))) == [200] * 24
    running.servers.check()


def links(running: Running, bucket_bytes: int = BUCKET_BYTES) -> dict[str, WeightSync[Any]]:
    """Return weight syncs by the name of the server."""
    apart = BroadcastSync([running.servers["apart"]], bucket_bytes=bucket_bytes, workers=1, device=torch.device("cpu"))
    return {"student": FileSync([running.student], bucket_bytes=bucket_bytes), "apart": apart}


@pytest.mark.parametrize("name", ["student", "apart"])
def test_after_a_sync_the_engine_answers_as_the_new_weights_do(
    running: Running, models: tuple[Path, Path], name: str
) -> None:
    old, new = (load_model(model) for model in models)
    prompts = [Question(models[0], row) for row in digit_sums("train", 2, seed=0)]
    with links(running, 200_000)[name] as sync:  # several buckets whose boundaries cut layers
        for version, model, stale in [("start", old, new), ("step-1", new, old), ("step-2", old, new)]:
            sync.send(model.named_parameters(), version)
            assert sync.versions() == [version]
            for _ in range(2):  # the second time, image and prefix are in the engine's caches
                for prompt in prompts:
                    answer = prompt.ask(running.servers[name])
                    assert {span["version"] for span in answer["weight_versions"]} == {version}
                    tokens = answer["token_ids"]
                    greedy, logprobs = prompt.forward(model, tokens)
                    served = torch.tensor([entry["logprob"] for entry in answer["logprobs"]["content"]])
                    assert tokens == greedy
                    assert (served - logprobs).abs().max() < 1e-4
                    assert (served - prompt.forward(stale, tokens)[1]).abs().max() > 0.1  # the test can tell them apart


def test_a_sync_that_lacks_a_weight_is_an_error(running: Running, models: tuple[Path, Path]) -> None:
    weights = list(load_model(models[0]).named_parameters())
    with FileSync([running.student]) as sync:
        with pytest.raises(SyncError, match=r"1 parameters were not sent, such as .*norm\.weight"):
            sync.send(weights[:-1], "incomplete")
        with pytest.raises(SyncError, match="start_weight_update"):  # and the engine stays unusable
            sync.send(weights, "complete")


@pytest.mark.parametrize("name", ["words", "words_and_vision"])
def test_an_adapter_scores_as_its_merged_weights_do(running: Running, models: tuple[Path, Path], name: str) -> None:
    model = PeftModel.from_pretrained(load_model(models[1]), running.adapters[name]).merge_and_unload()
    base = load_model(models[1])
    tokens = list(range(40, 60))
    for row in digit_sums("train", 2, seed=1):
        question = Question(models[1], row)
        served = question.score(running.servers[name], tokens)
        assert (served - question.forward(model, tokens)[1]).abs().max() < 1e-3
        assert (served - question.forward(base, tokens)[1]).abs().max() > 0.1  # the test can tell them apart


def test_adapters_that_are_asked_together_do_not_mix(running: Running, models: tuple[Path, Path]) -> None:
    questions = [Question(models[1], row) for row in digit_sums("train", 3, seed=3)]
    asked = [(question, running.servers[name]) for question in questions for name in running.adapters]
    alone = [question.score(server, list(range(40, 60))) for question, server in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        for _ in range(3):
            together = list(pool.map(lambda one: one[0].score(one[1], list(range(40, 60))), asked))
            assert all((a - b).abs().max() < 1e-4 for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("process", ["API server", "engine"])
def test_scoring_goes_on_after_a_teacher_was_killed_and_nothing_is_lost(
    running: Running, models: tuple[Path, Path], process: str
) -> None:
    questions = [Question(models[1], row) for row in digit_sums("train", 4, seed=2)]
    asked = [(question, list(range(begin, begin + 8))) for question in questions for begin in (30, 40, 50, 60)]
    before = [question.score(running.servers["words"], tokens) for question, tokens in asked]
    restarts = running.servers.restarts["teacher"]
    old = processes_of(running.teacher, running.children)
    os.kill(min(old) if process == "API server" else max(old), signal.SIGKILL)

    deadline = time.monotonic() + LIMIT

    def insist(question: "Question", tokens: list[int]) -> torch.Tensor:
        while True:
            try:
                return question.score(running.servers["words"], tokens)
            except (httpx.TransportError, AssertionError):
                assert time.monotonic() < deadline
                time.sleep(0.2)

    with ThreadPoolExecutor(8) as pool:
        after = list(pool.map(lambda one: insist(*one), asked))
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(after, before, strict=True))
    running.servers.check()
    assert running.servers.restarts["teacher"] == restarts + 1
    assert not any(psutil.pid_exists(pid) for pid in old)


def test_a_student_that_dies_is_started_again_with_the_weights_of_its_folder_and_gets_all_once_more(
    running: Running, models: tuple[Path, Path]
) -> None:
    with FileSync([running.student]) as sync:
        assert sync.versions() != [FRESH]  # from a test above
        os.kill(min(processes_of(running.student, running.children)), signal.SIGKILL)
        assert version_of_the_next(running, sync) == FRESH
        weights = list(load_model(models[0]).named_parameters())
        with pytest.raises(SyncError, match="was started again, and has no weights that a partial set could add to"):
            sync.send(weights[:4], "in part", partial=True)
        sync.send(weights, "whole")
        assert sync.versions() == ["whole"]
    assert running.servers.restarts["student"] == 1


def test_an_engine_that_dies_with_the_trainers_call_in_it_answers_with_an_error_and_is_started_again(
    running: Running, models: tuple[Path, Path]
) -> None:
    engine = max(processes_of(running.student, running.children))
    before = running.servers.restarts["student"]
    with FileSync([running.student]) as sync, ThreadPoolExecutor(1) as pool:
        os.kill(engine, signal.SIGSTOP)
        sending = pool.submit(sync.send, load_model(models[0]).named_parameters(), "never")
        time.sleep(1)
        assert not sending.done()
        os.kill(engine, signal.SIGKILL)
        assert isinstance(sending.exception(timeout=60), SyncError)
        assert version_of_the_next(running, sync) == FRESH
    assert running.servers.restarts["student"] == before + 1


def test_weights_are_broadcast_again_to_an_engine_that_was_started_again(
    running: Running, models: tuple[Path, Path]
) -> None:
    weights = list(load_model(models[1]).named_parameters())
    with links(running)["apart"] as sync:
        sync.send(weights, "first")
        os.kill(min(processes_of(running.servers["apart"], running.children)), signal.SIGKILL)
        assert version_of_the_next(running, sync) == FRESH
        sync.forget()
        sync.send(weights, "second")
    assert running.servers.restarts["apart"] == 1


def version_of_the_next(running: Running, sync: WeightSync[Any]) -> str | None:
    """Return the weight version of the student's engine that replaces a killed one."""
    deadline, version = time.monotonic() + LIMIT, None
    while version is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        running.servers.check()
        with suppress(SyncError):
            version = sync.versions()[0]
    return version


def processes_of(endpoint: Endpoint, children: Children) -> list[int]:
    """Return the process ids of an endpoint's API server, and of its engine."""
    port = int(endpoint.url.rpartition(":")[2])
    return [
        p.pid
        for p in descendants(children)
        if any(c.laddr.port == port for c in p.net_connections() if c.status == "LISTEN")
    ]


def descendants(children: Children) -> list[psutil.Process]:
    return [p for child in children if child.alive for p in psutil.Process(child.pid).children(recursive=True)]
