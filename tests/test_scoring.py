"""A scorer compared with a real vLLM server and with transformers, and the fake server compared with the real one."""

import asyncio
import base64
import json
import random
from contextlib import ExitStack

import httpx
import pytest
import torch
from fake_vllm import FakeVLLM
from scoring import TOKENS, processor_encoder, prompt
from transformers import AutoModelForImageTextToText

from mmopd.config import Engine, Fleet
from mmopd.demo.world import additions, build_student, digit_sums
from mmopd.modality import Encoder
from mmopd.records import Encoded, Score
from mmopd.rollout.student_client import StudentClient
from mmopd.runtime.processes import Children
from mmopd.serving import replicas, wire
from mmopd.serving import servers as serve_module
from mmopd.serving.servers import serve
from mmopd.serving.specs import BLOCK, ServerSpec
from mmopd.teacher.scorer import Scorer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return processor_encoder(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def image(encoder):
    return encoder.encode(prompt(digit_sums("few", 1, 0)[0], "image"))


@pytest.fixture(scope="module")
def text(encoder):
    return encoder.encode(prompt(additions("few", 1, 0)[0], "text"))


def fleet(view="full", **limits):
    return Fleet.model_validate(
        {"teachers": {"t": {"endpoints": ["http://t"], **limits}}, "routes": [{"teacher": "t", "view": view}]}
    )


@pytest.fixture(scope="module")
def real(server, tmp_path_factory):
    """Start a real vLLM server with a random tiny Qwen3-VL. Returns (endpoint, folder)."""
    folder = tmp_path_factory.mktemp("real")
    build_student(folder / "model")
    engine = Engine(dtype="float32", max_model_len=512, max_num_seqs=32, kv_cache_mib=64, enforce_eager=True)
    spec = ServerSpec("tiny", folder / "model", engine, updatable=True)  # with the route that empties its cache

    def counting(*args):
        """Serve as mmopd does, but let vLLM count how often an image is processed."""
        server = command(*args)
        server["argv"].remove("--disable-log-stats")
        return server

    command = serve_module.to_server
    with pytest.MonkeyPatch.context() as patch, Children() as children, ExitStack() as stack:
        patch.setattr(serve_module, "to_server", counting)
        servers = stack.enter_context(serve([spec], children, folder, lambda name, what: None))
        yield servers["tiny"], folder / "model"


def hf_rows(model, encoder, encoded, tokens):
    """Return log-probs [T, V] at the positions of the response's tokens."""
    ids = torch.tensor([[*encoded.expanded, *tokens]])
    pixels = {}
    if encoded.grids:
        values, grids = encoder.pixel_values(encoded)
        pixels = {"pixel_values": values, "image_grid_thw": grids}
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=(ids == encoder.image_token).int(), **pixels).logits[0]
    return logits[len(encoded.expanded) - 1 : -1].log_softmax(-1)


def hf_logprobs(model, encoder, encoded, tokens):
    return [row[t].item() for row, t in zip(hf_rows(model, encoder, encoded, tokens), tokens, strict=True)]


def test_a_real_server_gives_the_log_probs_of_transformers_for_text_and_image(real):
    endpoint, folder = real
    encoder = Encoder(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [prompt(r, "image") for r in digit_sums("few", 3, 0)] + [prompt(r, "text") for r in additions("few", 3, 0)]

    async def main():
        async with (
            StudentClient(endpoint, encoder) as engine,
            Scorer(fleet(), {}, {"t": [endpoint]}, encoder) as scorer,
        ):
            for encoded in map(encoder.encode, rows):
                responses = await engine.sample(encoded, 4, 11, max_tokens=24)
                assert [r.tokens for r in responses] == [
                    r.tokens for r in await engine.sample(encoded, 4, 11, max_tokens=24)
                ]
                one_by_one = [(await engine.sample(encoded, 1, 11 + i, max_tokens=24))[0].tokens for i in range(4)]
                assert [r.tokens for r in responses] == one_by_one
                assert len({r.tokens for r in responses}) == 4
                for r in responses:
                    score = await scorer.score(encoded, r.tokens)
                    expected = pytest.approx(hf_logprobs(model, encoder, encoded, r.tokens), abs=1e-4)
                    assert list(score.logprobs) == expected
                    assert list(r.logprobs) == expected
                    assert await engine.logprobs(encoded, r.tokens) == expected
            return scorer.counts

    counts = asyncio.run(main())
    assert counts["scored"] == counts["asked"] == 24
    assert not counts["unshared"]


def test_a_real_server_processes_the_image_of_a_group_once(real):
    endpoint, folder = real
    encoder = Encoder(folder)
    image = encoder.encode(prompt(digit_sums("few", 9, 5)[8], "image"))

    def cache():
        return [counted(endpoint, f"vllm:mm_cache_{what}_total") for what in ("queries", "hits")]

    async def main():
        async with Scorer(fleet(), {}, {"t": [endpoint]}, encoder) as scorer:
            return await asyncio.gather(*(scorer.score(image, (i, i + 1)) for i in range(16)))

    before = cache()
    scores = asyncio.run(main())
    assert all(isinstance(score, Score) for score in scores)
    assert [after - was for after, was in zip(cache(), before, strict=True)] == [16, 15]


def counted(endpoint, what):
    """Return one of the server's own counters."""
    lines = httpx.get(f"{endpoint.url}/metrics", headers=endpoint.headers).text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(what))


def test_a_real_server_computes_a_prompt_once_for_its_responses_and_their_bits_depend_on_nothing_else(real):
    endpoint, folder = real
    encoder = Encoder(folder)
    draw = random.Random(0)

    def drawn(length):
        return tuple(draw.choices(range(300, 900), k=length))

    def plain(length):
        ids = drawn(length)
        return Encoded(prompt(additions("few", 1, 0)[0], "text"), ids, ids, ())

    row = digit_sums("few", 2, 3)[0]
    shown = [encoder.encode(prompt({**row, "images": r["images"]}, "image")) for r in digit_sums("few", 2, 3)]
    assert shown[0].expanded == shown[1].expanded  # they differ in the image alone
    prompts = [*map(plain, (2, 31, 32, 33, 64, 65, 200)), *shown]
    work = [(encoded, drawn(length)) for encoded in prompts for length in (1, 2, 31, 32, 33, 100)]

    def body(encoded, tokens, *, alone=False):
        made = json.loads(wire.scoring_body(endpoint.model, encoded, tokens))
        if alone:
            del made["sampling_params"]["extra_args"]
        return made

    def score(work, *, alone=False, together=True):
        """Return the log-probs of each piece of work, and the number of tokens that the server has computed."""
        before = counted(endpoint, "vllm:request_prefill_kv_computed_tokens_sum")

        async def one(http, encoded, tokens):
            headers = endpoint.headers | {wire.REQUEST_ID: "r"}
            url = endpoint.url + wire.PATH
            async with http.post(url, json=body(encoded, tokens, alone=alone), headers=headers) as reply:
                found = wire.parse_scored(await reply.read(), "r", encoded.expanded, tokens)
            assert found.shares_prompts is not alone
            return found.logprobs

        async def main():
            async with replicas.connect() as http:
                if together:
                    return await asyncio.gather(*(one(http, *pair) for pair in work))
                return [await one(http, *pair) for pair in work]

        scores = asyncio.run(main())
        return scores, counted(endpoint, "vllm:request_prefill_kv_computed_tokens_sum") - before

    def empty():
        assert httpx.post(f"{endpoint.url}/reset_prefix_cache", headers=endpoint.headers).status_code == 200

    empty()
    first, computed = score(work)
    shared = [(len(encoded.expanded) - 1) // BLOCK * BLOCK for encoded in prompts]
    rest = sum(len(encoded.expanded) + len(tokens) for encoded, tokens in work) - 6 * sum(shared)
    assert computed == rest + sum(shared)
    assert score(work, together=False) == (first, rest)  # all found in the cache
    empty()
    assert score(work[::-1], together=False) == (first[::-1], computed)  # another response comes first
    whole, computed = score(work, alone=True)
    assert computed == sum(len(encoded.expanded) + len(tokens) for encoded, tokens in work)
    assert max(abs(a - b) for x, y in zip(first, whole, strict=True) for a, b in zip(x, y, strict=True)) < 1e-5
    assert first[-1] != score([(shown[0], work[-1][1])])[0][0]  # the image counts


def test_the_likeliest_tokens_of_a_real_server_are_those_of_transformers(real):
    endpoint, folder = real
    encoder = Encoder(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    encoded = encoder.encode(prompt(digit_sums("few", 1, 0)[0], "image"))

    async def main():
        async with Scorer(fleet(), {}, {"t": [endpoint]}, encoder, top_k=7) as scorer:
            return await scorer.score(encoded, TOKENS)

    score = asyncio.run(main())
    rows = hf_rows(model, encoder, encoded, TOKENS)
    assert list(score.logprobs) == pytest.approx([row[t].item() for row, t in zip(rows, TOKENS, strict=True)], abs=1e-4)
    for row, top in zip(rows, score.top, strict=True):
        assert set(top) == set(row.topk(7).indices.tolist())
        assert all(value == pytest.approx(row[token].item(), abs=1e-4) for token, value in top.items())


def test_the_fake_server_speaks_the_wire_format_of_the_real_one(real, encoder, image):
    async def replies(endpoint):
        """Return vLLM's list of models, the text of some ids, and the keys in the replies to a scoring and a sampling
        request.
        """
        seen = []
        settings = {"n": 2, "seed": 1, "max_tokens": 4, "logprobs": 0, "detokenize": False, "logit_bias": {}}
        async with replicas.connect() as http:
            for sampling in ({"max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}, settings):
                parts = [
                    {
                        "type": "image_url",
                        "url": "data:image/*;base64," + base64.b64encode(image.prompt.images[0]).decode(),
                    }
                ]
                body = {
                    "model": endpoint.model,
                    "token_ids": image.ids,
                    "content_parts": parts,
                    "sampling_params": sampling,
                }
                headers = endpoint.headers | {"X-Request-Id": "r1"}
                async with http.post(
                    f"{endpoint.url}/inference/v1/generate", json=body | {"return_token_ids": True}, headers=headers
                ) as r:
                    reply = await r.json()
                assert reply["request_id"] == "generate-tokens-r1"
                assert reply["prompt_token_ids"] == list(image.expanded)
                choice = reply["choices"][0]
                content = choice["logprobs"]["content"][0] if choice["logprobs"] else {}
                row = next(iter(reply["prompt_logprobs"][1].values())) if reply["prompt_logprobs"] else {}
                seen.append([sorted(d) for d in (reply, choice, choice["weight_versions"][0], content, row)])
            async with http.get(f"{endpoint.url}/v1/models", headers=endpoint.headers) as r:
                (model,) = (await r.json())["data"]
            body = {"model": endpoint.model, "tokens": list(image.ids)}
            async with http.post(f"{endpoint.url}/detokenize", json=body, headers=endpoint.headers) as r:
                text = await r.json()
        return seen, model["id"], isinstance(model["max_model_len"], int), text

    async def main():
        async with FakeVLLM(encoder) as fake:
            return await replies(fake.endpoint), await replies(real[0])

    fake_replies, real_replies = asyncio.run(main())
    assert fake_replies == real_replies


def test_a_real_server_refuses_what_it_cannot_score_and_the_next_request_is_unharmed(real, encoder, text):
    async def main():
        async with Scorer(fleet(), {}, {"t": [real[0]]}, encoder) as scorer:
            bad = await asyncio.gather(scorer.score(text, (5000,)), scorer.score(text, tuple(range(600))))
            return bad, await scorer.score(text, TOKENS)

    bad, good = asyncio.run(main())
    assert [r.cause for r in bad] == ["status", "status"]
    assert "vocabulary" in bad[0].detail
    assert "maximum model length" in bad[1].detail
    assert isinstance(good, Score)
