"""Scores on disk: a resumed run requests no score twice, a kill costs at most one record, a checkpoint clears them."""

import asyncio
import random

import pytest
from fake_vllm import FakeVLLM

from mmopd.config import Fleet
from mmopd.demo.world import additions, build_processor
from mmopd.modality import Encoder
from mmopd.records import Prompt, Score
from mmopd.teacher import score_cache
from mmopd.teacher.score_cache import ScoreCache
from mmopd.teacher.scorer import Scorer

FLEET = Fleet.model_validate({"teachers": {"t": {"endpoints": ["http://t"]}}, "routes": [{"teacher": "t"}]})


def key(i):
    return i.to_bytes(score_cache.KEY, "little")


def test_what_was_kept_is_there_again_for_any_number_of_ranks(tmp_path):
    for rank in range(3):
        with ScoreCache(tmp_path, rank) as kept:
            kept.add(key(rank), (-0.5, -float(rank)))
            kept.add(key(10 + rank), ())
    with ScoreCache(tmp_path, 0) as kept:
        assert len(kept) == 6
        assert [kept.get(key(rank)) for rank in range(3)] == [(-0.5, -float(rank)) for rank in range(3)]
        assert kept.get(key(11)) == ()
        assert kept.get(key(99)) is None


def test_a_record_that_a_kill_cut_short_is_dropped_and_the_rest_is_kept(tmp_path):
    with ScoreCache(tmp_path, 0) as kept:
        for i in range(5):
            kept.add(key(i), tuple(-float(j) for j in range(i)))
    file = tmp_path / "scores-0.bin"
    whole = file.read_bytes()
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        with ScoreCache(tmp_path, 0) as kept:
            before = len(kept)
            kept.add(key(50), (-7.0,))
        with ScoreCache(tmp_path, 0) as kept:
            assert len(kept) == before + 1
            assert kept.get(key(50)) == (-7.0,)
            assert all(kept.get(key(i)) == tuple(-float(j) for j in range(i)) for i in range(before))


def test_a_checkpoint_empties_it(tmp_path):
    with ScoreCache(tmp_path, 0) as kept:
        kept.add(key(1), (-1.0,))
        kept.clear()
        assert kept.get(key(1)) is None
        kept.add(key(2), (-2.0,))
    with ScoreCache(tmp_path, 0) as kept:
        assert kept.get(key(1)) is None
        assert kept.get(key(2)) == (-2.0,)


def test_it_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(score_cache, "MAX_BYTES", 1000)
    with ScoreCache(tmp_path, 0) as kept:
        for i in range(100):
            kept.add(key(i), (-1.0,) * 20)
    assert (tmp_path / "scores-0.bin").stat().st_size <= 1000


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    build_processor().save_pretrained(folder)
    encoder = Encoder(folder)
    row = additions("few", 1, 0)[0]
    return encoder, encoder.encode(Prompt("a/0", "text", "text", tuple(row["messages"]), (), row["answer"]))


def test_a_run_that_is_resumed_gets_the_same_scores_without_a_request(tmp_path, encoded):
    encoder, prompt = encoded
    responses = [tuple(random.Random(i).choices(range(300), k=9)) for i in range(20)]

    async def life(server):
        async with server:
            with ScoreCache(tmp_path, 0) as kept:
                async with Scorer(FLEET, {}, {"t": [server.endpoint]}, encoder, kept=kept) as scorer:
                    return await asyncio.gather(*(scorer.score(prompt, tokens) for tokens in responses)), dict(
                        scorer.counts
                    )

    first, _ = asyncio.run(life(FakeVLLM(encoder)))
    broken = FakeVLLM(encoder, lambda n: "500")
    second, counts = asyncio.run(life(broken))
    assert all(isinstance(score, Score) for score in first)
    assert second == first
    assert counts == {"asked": 20, "answers": 20, "reused": 20, "scored": 20}
    assert broken.requests == []
