import base64
import io
import os
import shutil
import signal
import socket
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
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from waiting import LIMIT

from mmopd.config import Engine
from mmopd.demo.world import build_student, digit_sums
from mmopd.errors import UserError
from mmopd.records import Encoded, Prompt
from mmopd.rollout.sync import BUCKET_BYTES, FRESH, BroadcastSync, FileSync, SyncError, WeightSync
from mmopd.runtime.processes import Children
from mmopd.serving import endpoint, wire
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.lora import read_adapter
from mmopd.serving.servers import Servers, serve
from mmopd.serving.specs import ServerSpec

pytest.importorskip("vllm")
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


def refused(spec: ServerSpec, logs: Path) -> str:
    """Return the message with which a server is refused, and check that no process is left."""
    with Children() as children, pytest.raises(UserError) as error, serve([spec], children, logs, lambda *event: None):
        pass
    assert not any(child.alive for child in children)
    return str(error.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "the folder has no config.json" in refused(ServerSpec("x", tmp_path, ENGINE, updatable=False), tmp_path)


def test_a_port_that_is_taken_is_named_with_its_key(models: tuple[Path, Path], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = refused(
            ServerSpec("x", models[0], ENGINE.model_copy(update={"port": port}), updatable=False), tmp_path
        )
    assert str(port) in message
    assert "engine.port" in message


def test_memory_that_is_short_is_said_with_what_is_needed(models: tuple[Path, Path], tmp_path: Path) -> None:
    message = refused(
        ServerSpec("x", models[0], ENGINE.model_copy(update={"kv_cache_mib": 10**9}), updatable=False), tmp_path
    )
    assert "KV cache 1,000,000,000" in message
    assert f"{psutil.virtual_memory().available >> 30:,}"[:1] in message
    assert "engine.kv_cache_mib" in message


@pytest.mark.usefixtures("server")
def test_a_server_that_dies_during_start_shows_its_last_words(models: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models[0], broken)
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
    assert not any(key in log.read_text() for log in running.logs.iterdir())


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


def make_adapters(model: Path, folder: Path) -> dict[str, Path]:
    """Write two adapters with random weights, one of them also for the vision part."""
    words = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    modules = {
        "words": (4, words),
        "words_and_vision": (8, rf"({words}|.*visual\.(blocks|merger).*\.(qkv|proj|linear_fc1|linear_fc2))"),
    }
    for seed, (name, (rank, target)) in enumerate(modules.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=16, target_modules=target, init_lora_weights=False)
        get_peft_model(load_model(model), config).save_pretrained(str(folder / name))
    return {name: folder / name for name in modules}


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


def load_model(path: Path) -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()


class Question:
    """An image prompt, for a server and for the model itself."""

    def __init__(self, model: Path, row: Any) -> None:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(model)
        text = processor.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        self.ids = processor.tokenizer.encode(text)
        self.image = row["images"][0]
        self.url = "data:image/png;base64," + base64.b64encode(self.image).decode()
        self.inputs = processor(text=[text], images=[Image.open(io.BytesIO(row["images"][0]))], return_tensors="pt")

    def ask(self, server: Endpoint) -> Any:
        """Return 12 greedy tokens."""
        body = {
            "token_ids": self.ids,
            "content_parts": [{"type": "image_url", "url": self.url}],
            "sampling_params": {
                "max_tokens": 12,
                "temperature": 0,
                "logprobs": 0,
                "detokenize": False,
                "ignore_eos": True,
            },
        }
        reply = httpx.post(f"{server.url}/inference/v1/generate", json=body, headers=server.headers, timeout=60)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]

    def score(self, server: Endpoint, tokens: list[int]) -> torch.Tensor:
        """Return the log-probs of `tokens` after the prompt."""
        prompt = Prompt("s/0", "t", "image", (), (self.image,), "")
        body = wire.scoring_body(server.model, Encoded(prompt, tuple(self.ids), (), ()), tokens)
        headers = {**server.headers, wire.REQUEST_ID: "x", "Content-Type": "application/json"}
        reply = httpx.post(server.url + wire.PATH, content=body, headers=headers, timeout=60)
        assert reply.status_code == 200, reply.text
        return torch.tensor(wire.parse_scores(reply.content, "x", self.inputs["input_ids"][0].tolist(), tokens))

    @torch.no_grad()
    def forward(self, model: Any, tokens: list[int]) -> tuple[list[int], torch.Tensor]:
        """Return the model's own choice at each position, and its log-probs of `tokens`."""
        ids = torch.cat([self.inputs["input_ids"], torch.tensor([tokens])], 1)
        pixels = {name: self.inputs[name] for name in ("pixel_values", "image_grid_thw")}
        types = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types, **pixels).logits[0]
        logprobs = logits.log_softmax(-1)[-len(tokens) - 1 : -1]
        return logprobs.argmax(-1).tolist(), logprobs.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
