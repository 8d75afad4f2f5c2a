"""A teacher without vision: another Qwen, with the student's tokenizer, scores answers to image prompts through the
text view.
"""

import asyncio

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mmopd.config import Engine, Fleet
from mmopd.demo.world import additions, build_processor, digit_sums
from mmopd.modality import Encoder
from mmopd.preflight.questions import look
from mmopd.preflight.run import preflight
from mmopd.prompts import Shards, write_shards
from mmopd.records import Prompt, Score
from mmopd.runtime.processes import Children
from mmopd.serving.servers import serve
from mmopd.serving.specs import ServerSpec
from mmopd.task import Task
from mmopd.teacher.router import check_tokenizers
from mmopd.teacher.scorer import Scorer
from mmopd.teacher.view import BUILT_IN, encode_view

pytestmark = pytest.mark.usefixtures("server")
FLEET = Fleet.model_validate(
    {"teachers": {"text": {"endpoints": ["http://t"], "view": "text"}}, "routes": [{"teacher": "text"}]}
)
TOKENS = (40, 41, 300, 42, 500)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return (the student's processor, the teacher without vision)."""
    student, teacher = (tmp_path_factory.mktemp(name) for name in ("student", "teacher"))
    processor = build_processor()
    processor.save_pretrained(student)
    processor.tokenizer.save_pretrained(teacher)
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = Qwen3Config(
        vocab_size=len(processor.tokenizer), head_dim=32, tie_word_embeddings=True, initializer_range=0.1, **sizes
    )
    Qwen3ForCausalLM(config).save_pretrained(teacher)
    return student, teacher


@pytest.fixture(scope="module")
def endpoint(folders, tmp_path_factory):
    engine = Engine(dtype="float32", max_model_len=512, max_num_seqs=16, kv_cache_mib=64, enforce_eager=True)
    spec = ServerSpec("text", folders[1], engine, updatable=False)
    with (
        Children() as children,
        serve([spec], children, tmp_path_factory.mktemp("logs"), lambda name, what: None) as servers,
    ):
        yield servers["text"]


def test_answers_to_images_and_texts_get_the_log_probs_of_transformers_at_the_students_tokens(folders, endpoint):
    encoder = Encoder(folders[0])
    check_tokenizers(folders[0], {"text": folders[1]})
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32).eval()
    rows = [("image", row) for row in digit_sums("few", 3, 0)] + [("text", row) for row in additions("few", 3, 0)]
    prompts = [
        encoder.encode(Prompt(f"{kind}/{i}", kind, kind, tuple(row["messages"]), tuple(row["images"]), row["answer"]))
        for i, (kind, row) in enumerate(rows)
    ]

    async def main():
        async with Scorer(FLEET, {}, {"text": [endpoint]}, encoder) as scorer:
            assert not any(map(scorer.sees_image, prompts))
            return await asyncio.gather(*(scorer.score(prompt, TOKENS) for prompt in prompts))

    for prompt, score in zip(prompts, asyncio.run(main()), strict=True):
        assert isinstance(score, Score), score
        shown = encode_view(encoder, prompt, BUILT_IN["text"]).ids
        assert encoder.image_token not in shown
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([[*shown, *TOKENS]])).logits[0, len(shown) - 1 : -1].log_softmax(-1)
        expected = [row[token].item() for row, token in zip(rows, TOKENS, strict=True)]
        assert list(score.logprobs) == pytest.approx(expected, abs=1e-4)


def test_preflight_passes_it_without_asking_for_eyes(folders, endpoint, tmp_path):
    encoder, task = Encoder(folders[0]), Task("digit_sum", "image")
    rows = digit_sums("few", 8, 0)
    write_shards(
        [task.prompt(str(i), "What is their sum?", row["answer"], row["images"]) for i, row in enumerate(rows)],
        tmp_path / "rows",
    )
    kinds = look({"digits": Shards(tmp_path / "rows")}, encoder)
    checks = asyncio.run(preflight(FLEET, {"digit_sum": task}, {"text": [endpoint]}, encoder, kinds, max_tokens=24))
    assert [check.state for check in checks] == ["ok"] * len(checks)
    names = " ".join(check.name for check in checks)
    assert "vocabulary" in names
    assert "canary" not in names
