"""The sampling defaults in a model's folder reach no client of its server; its end tokens reach them all."""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from answering_server import ASKED
from scoring import fleet, prompt

from mmopd.config import Engine
from mmopd.demo.world import additions, build_student
from mmopd.modality import Encoder
from mmopd.runtime.processes import Children
from mmopd.serving import wire
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.servers import Servers, serve
from mmopd.serving.specs import ServerSpec
from mmopd.teacher.scorer import Scorer

EXTREME: Mapping[str, Any] = {
    "do_sample": True,
    "temperature": 0.05,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.9,
    "repetition_penalty": 1.8,
    "max_new_tokens": 3,
}
QUESTION = "What is 12+34?"
Client = Callable[..., tuple[list[int], str]]


@pytest.fixture(scope="module")
def served(server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Servers, Path, frozenset[int]]]:
    """Serve two folders with the same weights and end tokens, of which one has extreme sampling defaults.

    Yields the servers, a folder, and the end tokens besides the tokenizer's own: one in eight of the vocabulary.
    """
    folder = tmp_path_factory.mktemp("defaults")
    engine = Engine(dtype="float32", max_model_len=256, max_num_seqs=8, kv_cache_mib=32)
    for name, defaults in (("plain", {}), ("extreme", EXTREME)):
        build_student(folder / name)
        file = folder / name / "generation_config.json"
        own = json.loads(file.read_text(encoding="utf-8"))
        ends = [own["eos_token_id"], *range(0, 400, 8)]
        file.write_text(json.dumps({**own, "eos_token_id": ends, **defaults}), encoding="utf-8")
    specs = [ServerSpec(name, folder / name, engine, updatable=True) for name in ("plain", "extreme")]
    with Children() as children, serve(specs, children, folder, lambda name, what: None) as servers:
        yield servers, folder / "plain", frozenset(ends[1:])


def ask(endpoint: Endpoint, path: str, **body: Any) -> list[dict[str, Any]]:
    """Return the choices of vLLM's answer."""
    reply = httpx.post(
        f"{endpoint.url}{path}", json={"model": endpoint.model, **body}, headers=endpoint.headers, timeout=120
    )
    reply.raise_for_status()
    return list(reply.json()["choices"])


def chat(endpoint: Endpoint, **sampling: Any) -> tuple[list[int], str]:
    """Return the ids of a chat completion and why it ended."""
    messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    [choice] = ask(endpoint, "/v1/chat/completions", messages=messages, return_token_ids=True, **sampling)
    return choice["token_ids"], choice["finish_reason"]


def complete(endpoint: Endpoint, **sampling: Any) -> tuple[list[int], str]:
    """Return the ids of a completion and why it ended."""
    [choice] = ask(endpoint, "/v1/completions", prompt=QUESTION, return_token_ids=True, **sampling)
    return choice["token_ids"], choice["finish_reason"]


def generate(endpoint: Endpoint, **sampling: Any) -> tuple[list[int], str]:
    """Return the ids that the route of rollouts gives to a client that says less than ours, and why they ended."""
    [choice] = ask(endpoint, "/inference/v1/generate", token_ids=[5, 6, 7], sampling_params=sampling)
    return choice["token_ids"], choice["finish_reason"]


CLIENTS = pytest.mark.parametrize("client", [chat, complete, generate])


@CLIENTS
@pytest.mark.parametrize("sampling", [{"seed": 1}, {"seed": 2}, {"max_tokens": 16, "temperature": 0}])
def test_a_client_that_is_silent_gets_neutral_values(
    served: tuple[Servers, Path, frozenset[int]], client: Client, sampling: Mapping[str, Any]
) -> None:
    """Compare the two folders; the last request says as much as one of lmms-eval."""
    servers, _, _ = served
    ids, finish = client(servers["plain"], **sampling)
    assert (ids, finish) == client(servers["extreme"], **sampling)
    assert len(ids) != EXTREME["max_new_tokens"]


@CLIENTS
def test_the_end_tokens_of_the_folder_end_a_response(
    served: tuple[Servers, Path, frozenset[int]], client: Client
) -> None:
    servers, _, ends = served
    for seed in (1, 2, 3):  # the student is untrained: it soon samples one of so many end tokens
        ids, finish = client(servers["extreme"], seed=seed, max_tokens=200)
        assert finish == "stop"
        assert ends.isdisjoint(ids[:-1])
        assert ids[-1] in ends


def test_the_last_request_of_these_tests_says_as_much_as_one_of_lmms_eval() -> None:
    assert {"model", "messages", "max_tokens", "temperature"} == ASKED


def test_rollouts_and_scores_do_not_depend_on_the_defaults_of_the_folder(
    served: tuple[Servers, Path, frozenset[int]],
) -> None:
    servers, folder, _ = served
    encoder = Encoder(folder)
    encoded = encoder.encode(prompt(additions("few", 1, 0)[0], "text"))
    sampling = wire.Sampling(4, 11, 1.0, 1.0, 0, 24, ())

    def rollouts(endpoint: Endpoint) -> list[list[int]]:
        body = json.loads(wire.sampling_body(endpoint.model, encoded, sampling))
        return [choice["token_ids"] for choice in ask(endpoint, "/inference/v1/generate", **body)]

    async def score(endpoint: Endpoint, responses: list[list[int]]) -> list[Any]:
        async with Scorer(fleet([{"teacher": "t"}], t={}), {}, {"t": [endpoint]}, encoder) as scorer:
            return [await scorer.score(encoded, tuple(ids)) for ids in responses]

    plain, extreme = servers["plain"], servers["extreme"]
    responses = rollouts(plain)
    assert responses == rollouts(extreme)
    assert len({tuple(ids) for ids in responses}) == sampling.n
    scores = [asyncio.run(score(endpoint, responses)) for endpoint in (plain, extreme)]
    assert [s.logprobs for s in scores[0]] == [s.logprobs for s in scores[1]]
