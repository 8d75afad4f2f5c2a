"""Heads of different height: a teacher's likeliest ids beyond the student's head, and rows of the student's own head
that have no token.
"""

import asyncio
import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from fake_vllm import FakeVLLM
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmopd.algorithm.divergence import NOTHING, forward_kl, jsd
from mmopd.algorithm.settings import Algorithm
from mmopd.config import Engine, Fleet, Teacher
from mmopd.demo.world import VOCAB_SIZE
from mmopd.modality import Encoder
from mmopd.modality.encode import head_rows
from mmopd.preflight.run import heights
from mmopd.records import Encoded, Outcome, Prompt, Response, Sample, Score
from mmopd.rollout.student_client import StudentClient
from mmopd.runtime.processes import Children
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.servers import serve
from mmopd.serving.specs import ServerSpec
from mmopd.teacher.scorer import Scorer
from mmopd.train.batch import build_batch, minibatches
from mmopd.train.loop import scoring
from mmopd.train.pack import MicroBatch
from mmopd.train.trainer import loss_of

HIGHER = VOCAB_SIZE + 6
FLEET = Fleet.model_validate({"teachers": {"t": {"endpoints": ["http://t"]}}, "routes": [{"teacher": "t"}]})
DENSE = Algorithm.model_validate({"objective": {"kind": "dense", "top_k": 3}, "margin": None, "balance": None})


@pytest.fixture(scope="module")
def higher(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a student whose head has six rows without a token, which have by far the largest logits."""
    folder = tmp_path_factory.mktemp("higher") / "student"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name, weight in weights.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            loud = 10 * weight.std() * torch.randn(HIGHER - VOCAB_SIZE, weight.shape[1])
            weights[name] = torch.cat([weight, loud])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["vocab_size"] = HIGHER
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def text(encoder: Encoder, key: str = "s/0") -> Encoded:
    return encoder.encode(Prompt(key, "t", "text", ({"role": "user", "content": "1+1"},), (), "2"))


def test_the_height_of_a_head_is_read_from_the_configuration(model: Path, higher: Path, tmp_path: Path) -> None:
    assert (head_rows(model), head_rows(higher), head_rows(tmp_path)) == (VOCAB_SIZE, HIGHER, None)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 7}), encoding="utf-8")  # of a text class
    assert head_rows(tmp_path) == 7
    encoder = Encoder(higher)
    assert encoder.head == HIGHER
    assert encoder.without_token == set(range(VOCAB_SIZE, HIGHER))


def test_likeliest_ids_beyond_the_head_are_left_out_of_a_score_and_counted(encoder: Encoder) -> None:
    student = copy.copy(encoder)
    student.head = 700  # type: ignore[misc]  # the fake teacher has ids up to 1023

    async def main() -> tuple[Score, Score, dict[str, float]]:
        async with FakeVLLM(encoder) as server:
            scores = []
            for one in (encoder, student):
                async with Scorer(FLEET, {}, {"t": [server.endpoint]}, one, top_k=20) as scorer:
                    score = await scorer.score(text(encoder), (5, 6, 7))
                    assert isinstance(score, Score)
                    scores.append(score)
            return (*scores, scoring(scorer.counts))

    whole, cut, metrics = asyncio.run(main())
    assert whole.top is not None
    assert cut.top is not None
    assert cut.logprobs == whole.logprobs
    assert list(cut.top) == [{i: x for i, x in at.items() if i < 700} for at in whole.top]
    beyond = sum(i >= 700 for at in whole.top for i in at)
    assert metrics["scoring/beyond_head"] == beyond > 0


def micro(logits: Tensor, ids: Tensor, teacher: Tensor) -> tuple[Tensor, MicroBatch]:
    """Return the output of a student's head for a micro-batch, and the micro-batch."""
    none = torch.zeros(len(ids))
    output = torch.log_softmax(logits, -1).gather(1, torch.cat([torch.zeros_like(ids[:, :1]), ids], 1))
    return output, MicroBatch({}, len(ids), none, none, none + 1 / len(ids), [0], teacher)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_mass_of_an_id_beyond_the_head_belongs_to_the_rest(encoder: Encoder, divergence: str) -> None:
    settings = DENSE.model_copy(update={"objective": DENSE.objective.model_copy(update={"divergence": divergence})})
    top = ({4: -0.5, 2: -1.5}, {}, {3: -0.1, 1: -3.0, 0: -4.0})  # ids with a row, of three likeliest each
    score = Score("t", (-0.5, -1.0, -2.0), 1.0, top)
    response = Response((4, 0, 1), (-1.0, -1.0, -1.0), "", "stop", (("", 3),))
    batch = build_batch([Sample(0, response, Outcome(1.0), score)], settings, 0)
    ((item,),) = minibatches(batch, [text(encoder)], 1)
    assert item.likeliest is not None
    ids, teacher = item.likeliest
    assert ids.tolist() == [[4, 2, 0], [0, 0, 0], [3, 1, 0]]
    assert (teacher == NOTHING).tolist() == [[False, False, True], [True] * 3, [False] * 3]

    torch.manual_seed(0)
    logits = torch.randn(3, 5, requires_grad=True)
    loss, _ = loss_of(*micro(logits, ids, teacher), settings)
    plain = torch.log_softmax(logits, -1)
    each = [
        (torch.tensor([list(at.values())]).reshape(1, -1), plain[i, list(at)].reshape(1, -1))
        for i, at in enumerate(top)
    ]
    expected = sum(forward_kl(*one) if divergence == "forward_kl" else jsd(*one, 0.5) for one in each) / 3
    assert torch.allclose(loss, expected.squeeze(), atol=1e-6)
    ours, theirs = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (loss, expected))
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert ours[1].abs().max() < 1e-6  # nothing is known there


def test_only_the_students_engine_bans_rows_without_a_token(higher: Path) -> None:
    encoder = Encoder(higher)
    endpoint = Endpoint("s", "http://s", "s", "k", "student")
    student = StudentClient(endpoint, encoder)
    teacher = StudentClient(dataclasses.replace(endpoint, role="teacher"), encoder)
    assert set(student.banned) - set(teacher.banned) == set(range(VOCAB_SIZE, HIGHER))


def test_the_preflight_says_heights_that_differ(model: Path, higher: Path) -> None:
    assert heights("t", Teacher(model=model), Encoder(model)) == []
    assert heights("t", Teacher(endpoints=("http://t",)), Encoder(model)) == []
    (check,) = heights("t", Teacher(model=higher), Encoder(model))
    assert (check.name, check.of, check.state) == ("head", "t", "ok")
    assert f"{HIGHER:,} rows, and {VOCAB_SIZE:,} of the student" in check.found


def test_a_real_engine_samples_no_row_without_a_token_and_scores_name_them(
    server: None, model: Path, higher: Path, tmp_path: Path
) -> None:
    encoder, student = Encoder(higher), Encoder(model)
    engine = Engine(dtype="float32", max_model_len=256, max_num_seqs=16, kv_cache_mib=64)
    spec = ServerSpec("student", higher, engine, updatable=True)

    async def main(endpoint: Endpoint) -> tuple[set[int], set[int], Score]:
        free = dataclasses.replace(endpoint, role="teacher")
        async with (
            StudentClient(endpoint, encoder) as banning,
            StudentClient(free, encoder) as all_rows,
            Scorer(FLEET, {}, {"t": [free]}, student, top_k=5) as scorer,
        ):
            sampled = [await one.sample(text(encoder), 8, 0, max_tokens=24) for one in (banning, all_rows)]
            score = await scorer.score(text(encoder), (5, 6, 7))
            assert isinstance(score, Score)
            assert scorer.counts["beyond_head"] > 0
        return (*({i for response in some for i in response.tokens} for some in sampled), score)

    with Children() as children, serve([spec], children, tmp_path, lambda *event: None) as servers:
        ours, everything, score = asyncio.run(main(servers["student"]))
    assert max(ours) < VOCAB_SIZE <= max(everything)
    assert score.top is not None
    assert all(i < VOCAB_SIZE for at in score.top for i in at)
