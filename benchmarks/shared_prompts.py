"""Measure what a real server computes for groups of responses: `python benchmarks/shared_prompts.py`, five minutes.

Two proportions: 16 short answers to a long prompt, and 16 long answers to a short one. For each:

- scores: tokens that the server computes, by its own counter, divided by P + G T, the least possible.
- responses/s: with shared prompts, and with a prompt of its own for each response, as any other client asks.
- bits: scores that differ when the responses are sent in reverse order, one prompt after the other.
- samples: prompt tokens that the server computes for G requests, divided by P.

The model is random, with 27 M parameters. The server computes with one thread.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import aiohttp
import torch
from rich.console import Console
from rich.table import Table
from scoring import ENGINE, GROUP, enlarge

from mmopd.demo.world import build_student
from mmopd.modality import Encoder
from mmopd.records import Encoded, Prompt
from mmopd.rollout.student_client import StudentClient
from mmopd.runtime.http import client
from mmopd.runtime.processes import Children
from mmopd.serving import servers, wire
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.replicas import connect
from mmopd.serving.specs import ServerSpec
from mmopd.serving.supervisor import Server

COMPUTED = "vllm:request_prefill_kv_computed_tokens_sum"
PROPORTIONS = ((1000, 64, 6), (100, 1000, 2))  # P, T, number of prompts
IN_FLIGHT = 32
IDS = range(300, 900)


@dataclass(frozen=True)
class Found:
    """Results of one way to score."""

    logprobs: list[tuple[float, ...]]
    seconds: float
    computed: float  # tokens


def drawn(seed: int, length: int, count: int) -> list[tuple[int, ...]]:
    """Return random ids."""
    rng = random.Random(seed)
    return [tuple(rng.choices(IDS, k=length)) for _ in range(count)]


def text(ids: tuple[int, ...]) -> Encoded:
    """Return a prompt of these ids."""
    return Encoded(Prompt("p/0", "t", "text", (), (), ""), ids, ids, ())


def computed(endpoint: Endpoint) -> float:
    """Return the number of prompt tokens that the server has computed."""
    with client(timeout=60.0) as http:
        lines = http.get(f"{endpoint.url}/metrics", headers=endpoint.headers).text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith(COMPUTED))


def score(endpoint: Endpoint, pairs: Sequence[tuple[Encoded, tuple[int, ...]]], *, shared: bool) -> Found:
    """Score all pairs of a prompt and a response."""

    async def one(http: aiohttp.ClientSession, places: asyncio.Semaphore, encoded: Encoded, tokens: Any) -> Any:
        body = json.loads(wire.scoring_body(endpoint.model, encoded, tokens))
        if not shared:
            del body["sampling_params"]["extra_args"]
        headers = endpoint.headers | {wire.REQUEST_ID: "r"}
        async with places, http.post(endpoint.url + wire.PATH, json=body, headers=headers) as reply:
            return wire.parse_scores(await reply.read(), "r", encoded.expanded, tokens)

    async def main() -> list[tuple[float, ...]]:
        places = asyncio.Semaphore(IN_FLIGHT)
        async with connect() as http:
            return await asyncio.gather(*(one(http, places, *pair) for pair in pairs))

    before = computed(endpoint)
    began = time.perf_counter()
    logprobs = asyncio.run(main())
    return Found(logprobs, time.perf_counter() - began, computed(endpoint) - before)


def sample(endpoint: Endpoint, prompts: Sequence[Encoded], encoder: Encoder) -> float:
    """Return the prompt tokens that the server computes when each response is a request of its own."""

    async def main() -> None:
        async with StudentClient(endpoint, encoder) as engine:
            await asyncio.gather(*(engine.sample(e, 1, i, max_tokens=4) for e in prompts for i in range(GROUP)))

    before = computed(endpoint)
    asyncio.run(main())
    return computed(endpoint) - before


def measure(endpoint: Endpoint, encoder: Encoder, table: Table) -> None:
    """Fill the table."""
    for length, answer, count in PROPORTIONS:
        prompts = [text(ids) for ids in drawn(length, length, 2 * count)]
        answers = drawn(answer + 1, answer, GROUP * count)
        pairs = [(prompts[i // GROUP], tokens) for i, tokens in enumerate(answers)]
        shared = score(endpoint, pairs, shared=True)
        again = score(endpoint, pairs[::-1], shared=True)
        alone = score(endpoint, pairs, shared=False)
        differ = sum(a != b for a, b in zip(shared.logprobs, again.logprobs[::-1], strict=True))
        apart = max(
            abs(a - b) for x, y in zip(shared.logprobs, alone.logprobs, strict=True) for a, b in zip(x, y, strict=True)
        )
        sampled = sample(endpoint, prompts[count:], encoder) / (count * length)
        table.add_row(
            f"P = {length:,}, T = {answer:,}",
            f"{shared.computed / (count * (length + GROUP * answer)):.3f}",
            f"{len(pairs) / shared.seconds:.1f}",
            f"{len(pairs) / alone.seconds:.1f}",
            f"{alone.seconds / shared.seconds:.2f} x",
            f"{differ} of {len(pairs)}",
            f"{apart:.1e}",
            f"{sampled:.3f}",
        )


def main() -> None:
    """Serve the model, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title=f"A prompt for {GROUP} responses, on CPU", title_justify="left")
    for column in (
        "",
        "computed / (P + G T)",
        "responses/s",
        "each alone",
        "ratio",
        "bits differ",
        "largest difference",
    ):
        table.add_column(column, justify="right" if column else "left")
    table.add_column("sampling: computed / P", justify="right")
    to_server = servers.to_server

    def counting(*args: Any) -> Server:
        server = to_server(*args)
        server["argv"].remove("--disable-log-stats")
        return server

    servers.to_server = counting
    engine = ENGINE.model_copy(update={"max_model_len": 2048, "kv_cache_mib": 512})
    with tempfile.TemporaryDirectory() as name, Children() as children:
        model = Path(name) / "model"
        build_student(model)
        enlarge(model)
        spec = ServerSpec("t", model, engine, updatable=False)
        with servers.serve([spec], children, Path(name), lambda name, what: None) as running:
            measure(running["t"], Encoder(model), table)
    Console(width=160).print(table)
    Console().print(
        f"python {' '.join(sys.argv)}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", highlight=False
    )


if __name__ == "__main__":
    main()
