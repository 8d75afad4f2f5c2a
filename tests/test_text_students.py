"""Language models as students, tiny and random: load, packing, update, LoRA, export, a real vLLM server and sync."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from student_worker import build, plain_logprobs, plain_update, run
from train_worker import make_items
from transformers import AutoModelForCausalLM

from mmopd.config import Engine
from mmopd.demo import world
from mmopd.modality import Encoder
from mmopd.records import Prompt
from mmopd.runtime.processes import Children
from mmopd.serving.servers import Servers, serve
from mmopd.serving.specs import ServerSpec
from mmopd.train.students import load_student
from mmopd.train.trainer import collator

RANKS = {"qwen3": 1, "qwen3_moe": 2}
ENGINE = Engine(dtype="float32", max_model_len=512, max_num_seqs=16, kv_cache_mib=64)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a model of each family."""
    folders = {kind: tmp_path_factory.mktemp(kind) / "model" for kind in RANKS}
    for kind, folder in folders.items():
        build(kind, folder)
    return folders


@pytest.fixture(scope="module")
def servers(server: None, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Serve both, forked from one process."""
    specs = [ServerSpec(kind, folder, ENGINE, updatable=True) for kind, folder in models.items()]
    with Children() as children, serve(specs, children, tmp_path_factory.mktemp("logs"), lambda *_: None) as servers:
        yield servers


@pytest.mark.parametrize("kind", RANKS)
def test_a_language_model_trains_follows_and_is_exported_as_plain_transformers_has_it(
    kind: str, models: dict[str, Path], servers: Servers
) -> None:
    model = models[kind]
    encoder = Encoder(model)
    whole, lora = run(
        model, model.parent / "out", [{"train": {}}, {"train": {"lora": {"rank": 2}}}], servers[kind], ranks=RANKS[kind]
    )
    plain = plain_logprobs(AutoModelForCausalLM.from_pretrained(model), encoder)
    assert differ(whole["before"], plain) < 1e-4
    assert differ(lora["before"], plain) < 1e-4
    expected = plain_update(
        AutoModelForCausalLM.from_pretrained(model), encoder, make_items(encoder, "TitIIt", 0), {"language"}
    )
    assert {name: whole["stats"][0][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    for found, number in ((whole, "0"), (lora, "1")):
        assert differ(found["before"], found["after"][0]) > 1e-3
        assert max(found["gaps"]) < 1e-4
        assert max(found["gaps"]) < 0.25 * min(found["unsynced"])
        exported, report = AutoModelForCausalLM.from_pretrained(
            model.parent / "out" / number / "export", output_loading_info=True
        )
        assert not any(report.values())
        assert differ(found["after"][-1], plain_logprobs(exported, encoder)) < 1e-4
    stored = load_file(model / "model.safetensors")
    assert whole["sent"] == [stored.keys(), stored.keys()]


@pytest.mark.parametrize("kind", RANKS)
def test_a_micro_batch_of_a_language_model_has_no_images(kind: str, tmp_path: Path) -> None:
    build(kind, tmp_path)
    encoder, student = Encoder(tmp_path), load_student(tmp_path, torch.float32)
    collate = collator(student, encoder)
    items = make_items(encoder, "TtT", 3)
    for chosen in (range(len(items)), ()):
        micro = collate(items, chosen)
        assert not {"pixel_values", "image_grid_thw", "media_index"} & micro.inputs.keys()
        assert micro.inputs["position_ids"].ndim == 2
        assert student(**micro.inputs).isfinite().all()


def test_contents_in_parts_are_one_text_and_prompts_with_images_are_refused_by_name(tmp_path: Path) -> None:
    build("qwen3", tmp_path)
    encoder = Encoder(tmp_path)
    text = {"role": "user", "content": "What is 1 + 1?"}
    parts = {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]}
    one, other = (encoder.encode(prompt(message)) for message in (text, parts))
    assert one.ids == other.ids == one.expanded
    assert "What is 1 + 1?" in encoder.decode(one.ids)
    (row,) = world.digit_sums("train", 1, 0)
    shown = Prompt("sum/0", "task", "image", tuple(row["messages"]), tuple(row["images"]), "")
    with pytest.raises(ValueError, match="sum/0: it shows images, and the student is a language model"):
        encoder.encode(shown)


def prompt(message: dict[str, Any]) -> Prompt:
    return Prompt("a/0", "task", "text", (message,), (), "2")


def differ(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Return the largest difference of two lists of log-probs."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
