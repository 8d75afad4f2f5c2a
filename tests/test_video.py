"""Video from ids to log-probs, on tiny clips that are made here, with a real server and real models."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import MIXED, clip, of_transformers, prompt, write_films
from fake_vllm import FakeVLLM
from transformers import AutoModelForImageTextToText

from mmopd.config import Engine, Fleet
from mmopd.errors import UserError
from mmopd.modality import Encoder, video
from mmopd.modality.registry import MEDIA
from mmopd.preflight.questions import look
from mmopd.preflight.run import answers, preflight
from mmopd.prompts import Shards
from mmopd.records import Encoded, Score
from mmopd.rollout.student_client import EngineError, StudentClient
from mmopd.runtime.processes import Children
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.servers import serve
from mmopd.serving.specs import ServerSpec
from mmopd.teacher.scorer import Scorer
from mmopd.train.pack import Collator, Layout
from mmopd.train.prefix_tree import Item
from mmopd.train.students import load_student

TOKENS = (5, 6, 7, 8)
FLEET = {
    "teachers": {"films": {"endpoints": ["http://a"]}, "other": {"endpoints": ["http://b"]}},
    "routes": [{"modality": "video", "teacher": "films"}, {"teacher": "other"}],
}


@pytest.fixture(scope="module")
def encoded(encoder: Encoder) -> dict[str, Encoded]:
    return {name: encoder.encode(one) for name, one in MIXED.items()}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Shards:
    return write_films(tmp_path_factory.mktemp("films"), model)


@pytest.fixture(scope="module")
def real(server: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    engine = Engine(dtype="float32", max_model_len=768, max_num_seqs=32, kv_cache_mib=64, enforce_eager=True, videos=2)
    spec = ServerSpec("films", model, engine, updatable=False)
    logs = tmp_path_factory.mktemp("logs")
    with Children() as children, serve([spec], children, logs, lambda name, what: None) as servers:
        yield servers["films"]


def score(real: Endpoint, encoder: Encoder, prompts: Sequence[Encoded], **how: bool) -> list[Any]:
    """Score by the teacher of the route: `films` for video, `other` for the rest, on the same server."""

    async def main() -> list[Any]:
        fleet = Fleet.model_validate(FLEET)
        async with Scorer(fleet, {}, {"films": [real], "other": [real]}, encoder) as scorer:
            return await asyncio.gather(*(scorer.score(one, TOKENS, **how) for one in prompts))

    return asyncio.run(main())


def test_a_real_server_sees_the_same_ids_and_gives_the_log_probs_of_transformers_and_of_the_trainer(
    real: Endpoint, model: Path, encoder: Encoder, encoded: dict[str, Encoded]
) -> None:
    """A score is only returned for the expected ids (`wire.parse_scored`): each score here proves a local expansion."""
    scores = dict(zip(encoded, score(real, encoder, list(encoded.values())), strict=True))
    reference = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    for name, one in encoded.items():
        assert isinstance(scores[name], Score), (name, scores[name])
        assert scores[name].teacher == ("films" if one.prompt.others else "other")
        assert list(scores[name].logprobs) == pytest.approx(
            of_transformers(reference, encoder, one, TOKENS), abs=1e-4
        ), name
    student = load_student(model, torch.float32).train()
    items = [Item.to_score(one, TOKENS) for one in encoded.values()]
    ways: tuple[Layout, ...] = ("masked", "alone")
    for way in ways:
        collate = Collator(encoder, student.model.get_rope_index, 3 * 2 * 16 * 16, 2, way)
        batch = collate(items, range(len(items)))
        with torch.no_grad():
            packed = student(**batch.inputs).split(len(TOKENS))
        for i, logprobs in zip(batch.order, packed, strict=True):
            name = list(encoded)[i]
            assert logprobs.tolist() == pytest.approx(scores[name].logprobs, abs=1e-4), name


def test_the_score_depends_on_the_frames_and_on_their_order(
    real: Endpoint, encoder: Encoder, encoded: dict[str, Encoded]
) -> None:
    shown = encoded["8 of 64x64"]
    frames = shown.prompt.items("video")[0]
    other = encoder.encode(shown.prompt.with_items("video", [MEDIA["video"].shuffled(frames, 0)]))
    assert other.expanded == shown.expanded
    assert sorted(other.prompt.items("video")[0]) == sorted(frames)
    (seen,), (blind,), (mixed,) = (
        score(real, encoder, [shown]),
        score(real, encoder, [shown], blind=True),
        score(real, encoder, [other]),
    )
    for changed in (blind, mixed):
        assert max(abs(a - b) for a, b in zip(seen.logprobs, changed.logprobs, strict=True)) > 1e-2


def test_frames_that_are_split_otherwise_into_clips_are_another_prompt(real: Endpoint, encoder: Encoder) -> None:
    frames = clip(8)
    prompts = [encoder.encode(prompt(frames[:at], frames[at:])) for at in (2, 4, 6)]
    assert len({one.ids for one in prompts}) == 1
    scores = score(real, encoder, prompts)
    assert len({one.logprobs for one in scores}) == 3


def test_the_engine_samples_answers_to_a_clip(real: Endpoint, model: Path, encoder: Encoder, films: Shards) -> None:
    reference = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()

    async def main() -> Any:
        async with StudentClient(real, encoder) as engine:
            shown = encoder.encode(films[1])
            return (
                shown,
                await engine.sample(shown, 4, 3, max_tokens=12),
                await engine.sample(shown, 4, 3, max_tokens=12),
            )

    shown, responses, again = asyncio.run(main())
    assert responses == again
    assert len({response.tokens for response in responses}) == 4
    for response in responses:
        assert set(encoder.banned).isdisjoint(response.tokens)
        assert list(response.logprobs) == pytest.approx(
            of_transformers(reference, encoder, shown, response.tokens), abs=1e-4
        )


def test_an_engine_that_takes_no_clips_is_told_with_the_key_to_set(
    encoder: Encoder, encoded: dict[str, Encoded]
) -> None:
    async def main() -> None:
        async with (
            FakeVLLM(encoder, lambda n: "500") as server,
            StudentClient(server.endpoint, encoder, timeout=0.5) as engine,
        ):
            await engine.sample(encoded["two clips"], 1, 0, max_tokens=1)

    with pytest.raises(EngineError, match=r"prompt v/two: .*; with clips it needs student\.engine\.videos=2"):
        asyncio.run(main())


def examine(real: Endpoint, encoder: Encoder, films: Shards, *, student: bool, clips: int = 1) -> dict[str, Any]:
    """Return the checks of a preflight, with or without answers of the student, which is the same server."""
    served = {"model": "here", "engine": {"dtype": "float32", "videos": clips}}
    fleet = Fleet.model_validate({"teachers": {"films": served}, "routes": [{"modality": "video", "teacher": "films"}]})
    kinds = look({"films": films}, encoder)

    async def main() -> Any:
        responses = await answers(real, encoder, kinds, max_tokens=8) if student else {}
        return await preflight(fleet, {}, {"films": [real]}, encoder, kinds, max_tokens=8, responses=responses)

    return {check.name: check for check in asyncio.run(main())}


def test_the_preflight_examines_a_teacher_of_clips(real: Endpoint, encoder: Encoder, films: Shards) -> None:
    checks = examine(real, encoder, films, student=True)
    assert {name: check.found for name, check in checks.items() if check.state != "ok"} == {}
    assert checks["image tokens"].numbers["sizes"] == 2
    assert checks.keys() >= {"context", "same score twice", "image canary"}
    with pytest.raises(
        UserError,
        match=r"teachers\.films\.engine\.videos is 0, but prompts with 1 are routed to the teacher: set it to 1",
    ):
        examine(real, encoder, films, student=False, clips=0)


def test_the_preflight_names_the_flag_of_a_server_that_reads_clips_at_another_rate(
    real: Endpoint, encoder: Encoder, films: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "FPS", 1)
    with pytest.raises(EngineError, match="the first difference"):
        examine(real, encoder, films, student=True)
    check = examine(real, encoder, films, student=False)["image tokens"]
    assert (check.state, check.found.partition(" on the server")[2]) == ("fail", ", 18 here, at other times")
    assert "--media-io-kwargs" in check.way_out
