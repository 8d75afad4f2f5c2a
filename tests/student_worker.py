"""Tiny random students of each family, and a training rank for them, with or without a real engine.

A rank calls `main(MODEL, OUT, JOB)`, with RANK etc. in the environment. JOB is a JSON list of {"train": settings}. Each
entry gets its own trainer; {"resume": NUMBER} continues from the checkpoint of that entry. Rank 0 writes OUT/NUMBER.pt.
If there is an OUT/endpoints.json, it names the engine that is updated.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from forks import start_ranks
from safetensors.torch import load_file, save_file
from train_worker import TRAIN, make_items
from transformers import AutoConfig, GenerationConfig, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from waiting import wait_for_exit

from mmopd.algorithm import clipped_loss
from mmopd.algorithm.settings import Algorithm
from mmopd.config import Train
from mmopd.demo.world import CHAT_TEMPLATE, VOCAB_SIZE, build_processor
from mmopd.modality import Encoder
from mmopd.rollout.student_client import StudentClient
from mmopd.rollout.sync import FileSync
from mmopd.runtime.run_folder import RunFolder
from mmopd.serving import endpoint
from mmopd.serving.endpoint import Endpoint
from mmopd.train.checkpoint import Checkpoints, load
from mmopd.train.distributed import Ranks, start, stop
from mmopd.train.export import export
from mmopd.train.families import part_of
from mmopd.train.prefix_tree import Item
from mmopd.train.trainer import Trainer
from mmopd.train.weight_probe import probe
from mmopd.train.weight_publisher import publish

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
# norm_topk_prob is in published configurations, and vLLM requires it
MOE = {"moe_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
GDN = {  # head sizes that vLLM's CPU kernels support
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 16,
}
DEEP = {"num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
# Like those of Qwen3's language models: a content is one text.
TEXT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "qwen3_vl": (TEXT, VISION | DEEP),
    "qwen3_vl_moe": (TEXT | MOE, VISION | DEEP),
    "qwen2_5_vl": (TEXT, VISION | {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}),
    "qwen3_5": (TEXT | GDN, VISION | {"num_position_embeddings": 256}),
    # All experts for each token: vLLM needs bfloat16 here, and with it the choice between two experts can differ from
    # float32.
    "qwen3_5_moe": (
        TEXT | GDN | MOE | {"num_experts_per_tok": 4, "shared_expert_intermediate_size": 64},
        VISION | {"num_position_embeddings": 256},
    ),
    "qwen3": (TEXT, None),
    "qwen3_moe": (TEXT | MOE, None),
}
SEEING = [kind for kind, (_, vision) in FAMILIES.items() if vision is not None]


def build(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a random student of two or three layers, with the demo's tokenizer."""
    text, vision = FAMILIES[kind]
    processor = build_processor()
    if kind == "qwen2_5_vl":
        pixels = {"shortest_edge": 28 * 28, "longest_edge": 224 * 224}
        patches = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2, "size": pixels}
        processor = transformers.Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(**patches),
            processor.tokenizer,
            Qwen2VLVideoProcessor(**patches),
            chat_template=CHAT_TEMPLATE,
        )
    ids = processor.tokenizer.get_vocab()
    tied = {"tie_word_embeddings": kind != "qwen3_vl_moe"}
    sections = [4, 2, 2] if "3_5" in kind else [6, 5, 5]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    rope |= {"mrope_interleaved": True} if kind != "qwen2_5_vl" else {}
    rope |= {"partial_rotary_factor": 0.5} if "3_5" in kind else {}
    common = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 2048,
        "initializer_range": 0.1,
        "rope_parameters": rope,
    }
    common |= {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    size = {"num_hidden_layers": len(text.get("layer_types", "ab")), **text, **common, **tied}
    if vision is None:
        size["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
        _save(transformers.AutoModelForCausalLM, AutoConfig.for_model(kind, **size), processor.tokenizer, folder, dtype)
        (folder / "chat_template.jinja").write_text(TEXT_TEMPLATE, encoding="utf-8")
        return
    config = AutoConfig.for_model(
        kind,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        text_config=size,
        vision_config=vision | {"initializer_range": 0.1},
        **tied,
    )
    _save(transformers.AutoModelForImageTextToText, config, processor, folder, dtype)
    if (
        kind == "qwen3_vl_moe"
    ):  # the published layout, which vLLM reads: [experts, in, out]; transformers 5.19 writes [experts, out, in]
        file = folder / "model.safetensors"
        weights = {
            name: w.transpose(1, 2).contiguous() if ".experts." in name else w for name, w in load_file(file).items()
        }
        save_file(weights, file, metadata={"format": "pt"})


def _save(kind: Any, config: Any, processor: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a random model with its processor."""
    torch.manual_seed(0)
    model = kind.from_config(config).to(dtype)
    model.generation_config = GenerationConfig(
        eos_token_id=config.get_text_config().eos_token_id, pad_token_id=config.get_text_config().pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def main(model_folder: str, out_folder: str, job: str) -> None:
    model = Path(model_folder)
    out = Path(out_folder)
    torch.set_num_threads(1)
    ranks = start(600)
    for number, one in enumerate(json.loads(job)):
        settings = Train.model_validate({**TRAIN.model_dump(), **one["train"]})
        result = (
            resume(model, out / one["resume"], settings, ranks)
            if "resume" in one
            else train(model, out / str(number), settings, ranks)
        )
        if ranks.rank == 0:
            torch.save(result, out / f"{number}.pt")
    ranks.barrier()
    stop()


def train(model: Path, out: Path, settings: Train, ranks: Ranks) -> dict[str, Any]:
    """Make two updates, each followed by a sync if there is an engine; then a checkpoint, a third update, and an
    export.
    """
    import deepspeed  # takes seconds, and tests that only build a model import this module, too

    encoder = Encoder(model)
    trainer = Trainer(model, encoder, settings, Algorithm(), ranks)
    items, ran = make_items(encoder, "TiI", 7), watch(trainer)
    found: dict[str, Any] = {"before": trainer.logprobs(items), "stats": [], "after": [], "gaps": [], "unsynced": []}
    found["sent"] = [{name for name, _ in trainer.named_weights(1 << 16, trained=trained)} for trained in (False, True)]
    endpoints = RunFolder(out.parent).endpoints
    students = endpoint.load_by_role(endpoints)[0] if endpoints.is_file() else []
    link = FileSync(students) if students and ranks.rank == 0 else None
    for step in range(3):
        if students:
            assert publish(trainer, link, f"{out.name}-{step}", everything=step == 0) is None
            found["gaps"].append(asyncio.run(gap(trainer, students[0], encoder)))
        if step == 2:
            Checkpoints(out, keep=1).save(trainer, step, {})
        found["stats"].append(trainer.update(make_items(encoder, "TitIIt", step)))
        found["after"].append(trainer.logprobs(items))
        if students and step < 2:
            found["unsynced"].append(asyncio.run(gap(trainer, students[0], encoder)))
    export(trainer, out / "export")
    found["kept"] = {}
    for name, p in trainer.student.named_parameters():
        if not p.requires_grad:
            with deepspeed.zero.GatheredParameters([p]):
                found["kept"][name.replace(".base_layer.", ".")] = p.detach().clone()
    state = [s for weight in trainer.engine.optimizer.optimizer.state.values() for s in weight.values() if s.ndim]
    return found | {"ran": dict(ran), "state": sum(s.numel() for s in state)}


def resume(model: Path, out: Path, settings: Train, ranks: Ranks) -> dict[str, Any]:
    """Make the third update from the checkpoint."""
    encoder = Encoder(model)
    trainer = Trainer(model, encoder, settings, Algorithm(), ranks)
    path = Checkpoints(out, keep=1).latest()
    assert path is not None
    load(trainer, path)
    return {
        "stats": [trainer.update(make_items(encoder, "TitIIt", 2))],
        "after": [trainer.logprobs(make_items(encoder, "TiI", 7))],
    }


def watch(trainer: Trainer) -> Counter[str]:
    """Count the backward passes of the first layer of each part."""
    ran, student = Counter[str](), trainer.student.model
    first = {"language": getattr(student, "language_model", student).layers[0].mlp}
    if hasattr(student, "visual"):
        first |= {"vision": student.visual.blocks[0].mlp, "projector": student.visual.merger}
    for part, module in first.items():
        module.register_full_backward_hook(lambda *_, part=part: ran.update([part]))
    return ran


async def gap(trainer: Trainer, student: Endpoint, encoder: Encoder) -> float:
    """Return the difference of trainer and engine in the log-prob of a token."""
    async with StudentClient(student, encoder) as engine:
        items = make_items(encoder, "TiI", 7)
        return await probe(trainer.logprobs(items), [engine], items, 100.0)


def run(
    model: Path, out: Path, job: Sequence[Mapping[str, Any]], engine: Endpoint, *, ranks: int
) -> list[dict[str, Any]]:
    """Run a job that updates an engine of `model`. Returns the findings of rank 0 for each settings."""
    out.mkdir(parents=True)
    endpoint.save(RunFolder(out).endpoints, [engine])
    workers = start_ranks("student_worker", [str(model), str(out), json.dumps(list(job))], ranks, f"{out}/{{rank}}.log")
    try:
        codes = wait_for_exit(workers, [out])
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0] * ranks, "\n".join(
        (out / f"{rank}.log").read_text(encoding="utf-8")[-4000:] for rank in range(ranks)
    )
    return [torch.load(out / f"{number}.pt", weights_only=False) for number in range(len(job))]


@torch.no_grad()
def plain_logprobs(model: Any, encoder: Encoder) -> list[torch.Tensor]:
    """Compute the log-probs of the worker's items one after the other, without packing, with transformers alone."""
    return [plain(model, encoder, item) for item in make_items(encoder, "TiI", 7)]


def plain_update(model: Any, encoder: Encoder, items: Sequence[Item], parts: Collection[str]) -> dict[str, float]:
    """Compute loss and gradient norm of an update with transformers alone, one item at a time; only the gradient of
    `parts` counts.
    """
    loss, clip = 0.0, {"clip_low": Algorithm().clip_low, "clip_high": Algorithm().clip_high}
    for item in items:
        one = clipped_loss(plain(model, encoder, item), item.old, item.advantage, item.weight, **clip)
        one.backward()
        loss += float(one.detach())
    squares = [float(p.grad.double().square().sum()) for name, p in model.named_parameters() if part_of(name) in parts]
    return {"loss": loss, "grad_norm": sum(squares) ** 0.5}


def plain(model: Any, encoder: Encoder, item: Item) -> torch.Tensor:
    """Compute the log-probs [T] of one item by the family's own forward pass, with full logits."""
    ids = torch.tensor([item.encoded.expanded + item.tokens])
    pictures = {}
    if item.encoded.grids:
        pixels, grids = encoder.pixel_values(item.encoded)
        pictures = {
            "pixel_values": pixels,
            "image_grid_thw": grids,
            "mm_token_type_ids": (ids == encoder.image_token).int(),
        }
    T = len(item.tokens)
    logits = model(input_ids=ids, use_cache=False, **pictures).logits[0, -T - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, -T:, None])[:, 0]
