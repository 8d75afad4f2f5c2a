"""Compare scoring by a real vLLM server with two rivals: `python benchmarks/scoring.py`, about six minutes.

- naive: one request after the other, each with its own connection, the json module; the same prompts and responses.
- engine: vLLM's offline `LLM.generate(prompt_logprobs=0, max_tokens=1)` on the same tokens and images, without HTTP.
- CPU: cost of one response for the client, and for the server; on few cores the server's part limits both rates.
- memory: memory of the client process before and after it has scored everything several times (nothing is taken from
  its cache).
- overlap: a step of `collect` (rollouts by a second server, scored as they finish) compared with its longer part, and
  with both in turn.

Every process computes with one thread. There are two models: the demo's (1.4 M parameters, where the server's own
Python is most of the work) and a larger one (27 M), where prefill is most of the work, as on a GPU with real models. 16
responses are scored for each prompt, half of the prompts with an image. All are different, which is the worst case for
the client's cache; in the rows "repeated" 3 of the 16 are different, as in a run of `mmopd demo` (43 requests for 265
scores, `scoring/reused`).
"""

import argparse
import asyncio
import gc
import json
import os
import pickle  # only in this benchmark's own folder
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3VLForConditionalGeneration

from mmopd.config import Engine, Fleet, Recipe
from mmopd.demo.world import additions, build_student, digit_sums
from mmopd.modality import Encoder
from mmopd.model_folder import load_config
from mmopd.records import Encoded, Outcome, Prompt, Score
from mmopd.rollout.collect import collect, seed_of
from mmopd.rollout.student_client import StudentClient
from mmopd.runtime.processes import Children
from mmopd.serving import wire
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.servers import CPU_ENV, ENV, serve
from mmopd.serving.specs import ServerSpec
from mmopd.teacher.scorer import Scorer

GROUP = 16
ENGINE = Engine(dtype="float32", max_model_len=1024, max_num_seqs=64, kv_cache_mib=256, enforce_eager=True)
FLEET = Fleet.model_validate(
    {"teachers": {"t": {"endpoints": ["http://t"], "timeout": 600}}, "routes": [{"teacher": "t"}]}
)


@dataclass(frozen=True)
class Work:
    """The workload: each prompt with its responses."""

    encoded: list[Encoded]
    responses: list[list[tuple[int, ...]]]

    @property
    def pairs(self) -> list[tuple[Encoded, tuple[int, ...]]]:
        """Every (prompt, response)."""
        return [(e, tokens) for e, group in zip(self.encoded, self.responses, strict=True) for tokens in group]


def enlarge(folder: Path) -> None:
    """Put a larger random model into the folder of the demo's."""
    config = load_config(folder)
    text = config.text_config
    text.hidden_size = 512
    text.intermediate_size = 1536
    text.num_hidden_layers = 8
    text.num_attention_heads = 16
    text.num_key_value_heads = 8
    config.vision_config.out_hidden_size = 512
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)


def workload(encoder: Encoder, prompts: int, length: int, seed: int, different: int = GROUP) -> Work:
    """Return half text, half image prompts, with responses of random ids.

    Responses have around `length` tokens, and `different` of each group are distinct.
    """
    rng = random.Random(seed)
    rows = [("image", row) for row in digit_sums("few", prompts // 2, seed)]
    rows += [("text", row) for row in additions("few", prompts // 2, seed)]
    encoded = [
        encoder.encode(
            Prompt(f"{kind}/{seed}-{i}", kind, kind, tuple(row["messages"]), tuple(row["images"]), row["answer"])
        )
        for i, (kind, row) in enumerate(rows)
    ]
    some = range(300, 900)
    drawn = [
        [tuple(rng.choices(some, k=rng.randint(length // 2, 3 * length // 2))) for _ in range(different)]
        for _ in encoded
    ]
    return Work(encoded, [[group[i % different] for i in range(GROUP)] for group in drawn])


async def score_all(work: Work, endpoint: Endpoint, encoder: Encoder) -> float:
    """Return the seconds that mmopd's client takes for all of it."""
    async with Scorer(FLEET, {}, {"t": [endpoint]}, encoder) as scorer:
        began = time.perf_counter()
        scores = await asyncio.gather(*(scorer.score(e, tokens) for e, tokens in work.pairs))
        seconds = time.perf_counter() - began
    assert all(isinstance(score, Score) for score in scores)
    return seconds


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # asks no proxy of the environment


def naive(work: Work, endpoint: Endpoint, limit: float) -> float:
    """Return the responses per second of a client that waits for each answer.

    It runs for about `limit` seconds, with the prompts in random order.
    """
    pairs = random.Random(0).sample(work.pairs, len(work.pairs))
    began = time.perf_counter()
    done = 0
    for encoded, tokens in pairs:
        body = json.loads(wire.scoring_body(endpoint.model, encoded, tokens))
        del body["sampling_params"]["extra_args"]  # no other client asks to share prompts
        headers = {
            "Content-Type": "application/json",
            "Connection": "close",
            wire.REQUEST_ID: uuid.uuid4().hex,
        } | endpoint.headers
        request = urllib.request.Request(endpoint.url + wire.PATH, json.dumps(body).encode(), headers)
        with DIRECT.open(request) as reply:
            rows = json.loads(reply.read())["prompt_logprobs"][-len(tokens) :]
        assert len([row[str(token)]["logprob"] for row, token in zip(rows, tokens, strict=True)]) == len(tokens)
        done += 1
        if time.perf_counter() - began > limit:
            break
    return done / (time.perf_counter() - began)


OFFLINE = """
import io, json, pickle, sys, time
from PIL import Image
from vllm import LLM, SamplingParams
model, path = sys.argv[1:]
settings, pairs = pickle.load(open(path, "rb"))  # written by this benchmark
llm = LLM(model, disable_log_stats=True, **settings)
params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
def request(ids, images):
    data = {"multi_modal_data": {"image": [Image.open(io.BytesIO(image)) for image in images]}} if images else {}
    return {"prompt_token_ids": ids, **data}
llm.generate([request(*pairs[0])], params, use_tqdm=False)
began = time.perf_counter()
replies = llm.generate([request(*pair) for pair in pairs], params, use_tqdm=False)
assert all(len(r.prompt_logprobs) >= len(ids) for r, (ids, _) in zip(replies, pairs))
print("seconds", time.perf_counter() - began)
"""


def offline(work: Work, model: Path) -> float:
    """Return the seconds that vLLM's engine takes for all of it, in a separate process."""
    settings = {
        "dtype": "float32",
        "max_model_len": ENGINE.max_model_len,
        "max_num_seqs": ENGINE.max_num_seqs,
        "enforce_eager": True,
    }
    settings |= {"kv_cache_memory_bytes": 256 << 20, "enable_chunked_prefill": False, "max_num_batched_tokens": 4096}
    file = model.parent / "work.pickle"
    file.write_bytes(pickle.dumps((settings, [([*e.ids, *tokens], list(e.prompt.images)) for e, tokens in work.pairs])))
    env = os.environ | CPU_ENV | ENV | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    ran = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(model), str(file)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    found = [line for line in ran.stdout.splitlines() if line.startswith("seconds")]
    if not found:
        raise RuntimeError(f"the offline engine did not run:\n{ran.stderr[-2000:]}")
    return float(found[0].split()[1])


class Quick:
    """Replaces the verifiers, which are not part of the measurement."""

    async def verify(self, task: str, response: str, answer: str) -> Outcome:
        """Return a wrong outcome."""
        return Outcome(0.0)


async def overlap(work: Work, student: Endpoint, teacher: Endpoint, encoder: Encoder) -> dict[str, float]:
    """Return the seconds of rollouts alone, of scoring alone, and of a step that does both."""
    settings = {"prompts": len(work.encoded), "group": GROUP, "max_tokens": 300}
    engine_of = {"model": "x", "engine": ENGINE.model_dump()}
    recipe = Recipe.model_validate(
        {"student": engine_of, "fleet": "x", "mixture": "x", "rollout": settings, "algorithm": {"visual": None}}
    )
    share = list(enumerate(work.encoded))
    async with StudentClient(student, encoder) as engine:

        async def rollouts(step: int) -> list[list[tuple[int, ...]]]:
            async def group(e: Encoded) -> list[tuple[int, ...]]:
                seed = seed_of(0, step, e.prompt.key)
                answers = await asyncio.gather(*(engine.sample(e, 1, seed + i, max_tokens=300) for i in range(GROUP)))
                return [response.tokens for (response,) in answers]

            return await asyncio.gather(*(group(e) for e in work.encoded))

        began = time.perf_counter()
        responses = await rollouts(0)
        generation = time.perf_counter() - began
        scoring = await score_all(Work(work.encoded, responses), teacher, encoder)
        async with Scorer(FLEET, {}, {"t": [teacher]}, encoder) as scorer:
            began = time.perf_counter()
            samples, _ = await collect(
                share,
                rollout=recipe.rollout,
                seed=recipe.seed,
                visual=recipe.algorithm.visual,
                step=1,
                engines=[engine],
                scorer=scorer,
                verifiers=Quick(),
            )  # type: ignore[arg-type]
            step = time.perf_counter() - began
    assert all(isinstance(sample.score, Score) for sample in samples)
    return {"rollouts": generation, "scoring": scoring, "step": step}


def cpu(process: psutil.Process) -> list[float]:
    """Return the CPU seconds of this process, and of all that it has started."""
    return [sum(sum(p.cpu_times()[:2]) for p in group) for group in ([process], process.children(recursive=True))]


def measure(model: Path, work: Work, length: int, encoder: Encoder, *, rounds: int) -> dict[str, float]:
    """Return the rates, CPU costs and memory of one model.

    These are responses per second of mmopd (also with repeated responses), naive and engine; ms of CPU for one
    response; MiB before and after `rounds` more.
    """
    n = len(work.pairs)
    process = psutil.Process()
    warm = workload(encoder, 2, 32, 1)
    found: dict[str, float] = {}
    spec = ServerSpec("t", model, ENGINE, updatable=False)
    with Children() as children, serve([spec], children, model.parent, lambda name, what: None) as servers:
        asyncio.run(score_all(warm, servers["t"], encoder))
        gc.collect()  # frees what building the models left
        used = cpu(process)
        found["ours"] = n / asyncio.run(score_all(work, servers["t"], encoder))
        found["client"], found["server"] = (
            1000 * (now - before) / n for now, before in zip(cpu(process), used, strict=True)
        )
        found["before"] = process.memory_info().rss / 2**20
        for _ in range(rounds):
            asyncio.run(score_all(work, servers["t"], encoder))
        found["after"] = process.memory_info().rss / 2**20
        found["naive"] = naive(work, servers["t"], 20.0)
        repeated = workload(encoder, len(work.encoded), length, 3, different=3)
        found["repeated"] = n / asyncio.run(score_all(repeated, servers["t"], encoder))
    found["engine"] = n / offline(work, model)
    return found


def step_of(student: Path, teacher: Path, work: Work, encoder: Encoder) -> dict[str, float]:
    """Serve both models, and run `overlap`."""
    specs = [
        ServerSpec("student", student, ENGINE, updatable=False),
        ServerSpec("teacher", teacher, ENGINE, updatable=False),
    ]
    with Children() as children, serve(specs, children, teacher.parent, lambda name, what: None) as servers:
        return asyncio.run(overlap(work, servers["student"], servers["teacher"], encoder))


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prompts", type=int, default=16, help="prompts of the small model's workload; the large one has half"
    )
    parser.add_argument("--length", type=int, default=64, help="mean tokens of a response")
    parser.add_argument("--rounds", type=int, default=5, help="times that the workload is scored again, for the memory")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(title="Scoring on CPU, one thread a process", title_justify="left")
    for column in ("model", "measured", "mmopd", "compared with", "ratio", "goal"):
        table.add_column(column, justify="left" if column in {"model", "measured"} else "right")
    with tempfile.TemporaryDirectory() as name:
        models = {size: Path(name) / size / "model" for size in ("small", "large")}
        for model in models.values():
            model.parent.mkdir()
            build_student(model)
        enlarge(models["large"])
        encoder = Encoder(models["small"])
        for size, prompts in (("small", args.prompts), ("large", args.prompts // 2)):
            work = workload(encoder, prompts, args.length, 0)
            found = measure(models[size], work, args.length, encoder, rounds=args.rounds if size == "small" else 0)
            for mine, rival, goal in (("ours", "naive", 5.0), ("repeated", "naive", 5.0), ("ours", "engine", 0.9)):
                ours = found[mine]
                theirs = found[rival]
                named = f"responses/s{', repeated' * (mine == 'repeated')}, compared with {rival}"
                table.add_row(size, named, f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f} x", f">= {goal} x")
            table.add_row(
                size,
                "ms of CPU per response: client, server",
                f"{found['client']:.1f}",
                f"{found['server']:.1f}",
                "",
                "",
            )
            if size == "small":
                grown = f"{found['before']:.0f} to {found['after']:.0f} MiB"
                table.add_row(size, f"memory over {args.rounds * len(work.pairs):,} scores", grown, "", "", "flat")
        step = step_of(models["small"], models["large"], workload(encoder, 8, args.length, 2), encoder)
    parts = [step["rollouts"], step["scoring"]]
    ours = step["step"]
    for what, theirs, goal in (("the longer part", max(parts), "<= 1.15 x"), ("one after the other", sum(parts), "")):
        named = f"a step: rollouts {parts[0]:.1f} s, scoring {parts[1]:.1f} s; compared with {what}"
        table.add_row("both", named, f"{ours:.1f} s", f"{theirs:.1f} s", f"{ours / theirs:.2f} x", goal)
    Console(width=140).print(table)
    Console().print(
        f"python {' '.join(sys.argv)}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", highlight=False
    )


if __name__ == "__main__":
    main()
