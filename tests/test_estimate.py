"""`mmopd plan`, the figures that can be proven without a GPU: parameters, the state of ZeRO-3, activations, KV cache.

As a program (`python test_estimate.py MODEL OUT`, with RANK etc. set) it is a training rank that measures the memory of
ZeRO-3.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from published import H100, PUBLISHED, plan, write_config, write_models
from student_worker import FAMILIES, SEEING, build
from waiting import LIMIT

from mmopd import catalog
from mmopd.algorithm.settings import Algorithm
from mmopd.capacity import memory
from mmopd.capacity.budget import Machines, budget
from mmopd.capacity.memory import GIB, Load
from mmopd.capacity.model_size import read_model
from mmopd.config import Engine, Lora, Recipe, Train
from mmopd.errors import UserError

TRAINS = {
    "bfloat16": Train(),
    "float32, frozen": Train(dtype="float32", freeze=("vision", "projector")),
    "lora": Train(lora=Lora(rank=4)),
}


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_models(tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build("qwen3_vl", folder)
    return folder


# Parameters of a model


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_count_is_that_of_the_real_model_and_needs_its_config_alone(kind: str, tmp_path: Path) -> None:
    build(kind, tmp_path / "whole")
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.json").write_bytes((tmp_path / "whole/config.json").read_bytes())
    auto = transformers.AutoModelForImageTextToText if kind in SEEING else transformers.AutoModelForCausalLM
    real = auto.from_pretrained(tmp_path / "whole")
    model = read_model(tmp_path / "config")
    assert model.parameters == sum(p.numel() for p in real.parameters())
    assert model.tower == (sum(p.numel() for p in real.model.visual.parameters()) if kind in SEEING else 0)
    tied = real.config.tie_word_embeddings
    assert model.embedding == (0 if tied else real.get_input_embeddings().weight.numel())
    text = real.config.get_text_config()
    assert (model.active < model.read) == (hasattr(text, "num_experts") and text.num_experts_per_tok < text.num_experts)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_count_of_a_published_configuration_is_the_published_one(name: str, tmp_path: Path) -> None:
    assert read_model(write_config(tmp_path / name, name)).parameters == pytest.approx(
        PUBLISHED[name][0] * 1e9, rel=0.02
    )


def test_a_mixture_of_experts_is_counted_whole_and_by_what_a_token_passes(workspace: Path) -> None:
    model = read_model(workspace / "models/Qwen3-30B-A3B-Instruct-2507")
    assert model.parameters == pytest.approx(30.5e9, rel=0.02)  # from the model card
    assert model.active + model.embedding == pytest.approx(3.3e9, rel=0.02)


def test_a_folder_without_a_config_says_that_one_is_enough(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no config\.json, the only file that an estimate needs"):
        read_model(tmp_path / "models/Qwen3-VL-4B-Instruct")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl", "architectures": ["Sys"]}', encoding="utf-8")
    with pytest.raises(UserError, match="no model can be built from it"):
        read_model(tmp_path)


# State of ZeRO-3


def measure(model: Path, out: Path) -> None:
    """Measure on one rank what DeepSpeed holds after `Trainer` is made, by the settings of TRAINS."""
    from mmopd.modality import Encoder
    from mmopd.train.distributed import start, stop
    from mmopd.train.trainer import Trainer

    ranks = start(240)
    found = {}
    for name, train in TRAINS.items():
        trainer = Trainer(model, Encoder(model), train, Algorithm(), ranks)
        trainer.engine.backward(
            trainer.engine(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False).logits.sum()
        )
        trainer.engine.step()  # Adam allocates its moments at the first step
        optimizer = trainer.engine.optimizer
        weights = list(trainer.student.parameters())
        masters = optimizer.fp32_partitioned_groups_flat
        moments = [v for state in optimizer.optimizer.state.values() for v in state.values() if v.numel() > 1]
        shared = {p.data_ptr() for p in optimizer.fp16_partitioned_groups_flat}
        found[name] = {
            "weights": sum(p.ds_tensor.numel() * p.element_size() for p in weights),
            "small weights": sum(p.numel() * p.element_size() for p in weights if p.ds_persist),
            "gradients": optimizer.grad_partitions_flat_buffer.nbytes,
            "optimiser": sum(t.nbytes for t in masters if t.data_ptr() not in shared) + sum(t.nbytes for t in moments),
        }
        found[name]["sent"] = sum(weight.numel() for _, weight in trainer.named_weights(trained=trainer.keeps_some))
        trainer.engine.destroy()
    if ranks.rank == 0:
        out.write_text(json.dumps(found), encoding="utf-8")
    stop()


@pytest.mark.usefixtures("server")
def test_the_state_of_zero_3_is_what_deepspeed_holds_on_each_rank_and_the_engine_gets_what_is_counted(
    tiny: Path, tmp_path: Path
) -> None:
    ranks = 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    env = os.environ | {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": paths,
    }
    command = [sys.executable, __file__, str(tiny), str(tmp_path / "found.json")]
    running = [
        subprocess.Popen(
            command,
            env=env | {"RANK": str(n), "LOCAL_RANK": str(n)},
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for n in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=LIMIT)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * ranks, errors[0][-3000:]
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    for name, train in TRAINS.items():
        model, sent = read_model(tiny, train), found[name].pop("sent")
        assert memory.zero_state(model, train, ranks) == found[name], name
        assert model.sent == sent, "what the engine gets after an update"


# Activations and KV cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_autograd_keeps_of_a_layer_is_at_most_the_estimate_and_not_much_less(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    write_config(tmp_path / "m", "Qwen3-VL-2B-Instruct")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m", attn_implementation="sdpa")
    width = dtype.itemsize
    token, patch = memory.layer(read_model(tmp_path / "m"), width)
    from transformers.models.qwen3_vl import modeling_qwen3_vl as theirs

    T, text, vision = 256, config.text_config, config.vision_config
    decoder = theirs.Qwen3VLTextDecoderLayer(text, 0).to(dtype)
    x = torch.randn(1, T, text.hidden_size, dtype=dtype, requires_grad=True)
    rotary = (torch.ones(1, T, text.head_dim, dtype=dtype), torch.zeros(1, T, text.head_dim, dtype=dtype))
    kept = saved(lambda: decoder(x, position_embeddings=rotary), {*decoder.parameters(), *rotary})
    assert 0.9 * token < kept / T <= 1.01 * token

    block = theirs.Qwen3VLVisionBlock(vision).to(dtype)
    patches = torch.randn(T, vision.hidden_size, dtype=dtype, requires_grad=True)
    half = vision.hidden_size // vision.num_heads
    rotary = (torch.ones(T, half, dtype=dtype), torch.zeros(T, half, dtype=dtype))
    kept = saved(
        lambda: block(patches, cu_seqlens=torch.tensor([0, T], dtype=torch.int32), position_embeddings=rotary),
        {*block.parameters(), *rotary},
    )
    assert 0.9 * patch < kept / T <= 1.02 * patch


def saved(forward: Any, apart: set[torch.Tensor]) -> int:
    """Return the bytes of the distinct memories that autograd keeps, without those of `apart`."""
    known = {t.untyped_storage().data_ptr() for t in apart}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        alive.append(tensor)  # so that its address is not reused
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()
    assert out is not None
    return sum(size for place, size in kept.items() if place not in known)


def test_a_token_of_kv_cache_is_what_vllm_counts(workspace: Path) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    for name, split in (("Qwen3-VL-4B-Instruct", 1), ("Qwen3-VL-2B-Instruct", 2), ("Qwen3-30B-A3B-Instruct-2507", 8)):
        model = read_model(workspace / "models" / name)
        heads = max(1, model.text.kv_heads // split)  # same as vLLM's ModelConfig.get_num_kv_heads
        page = FullAttentionSpec(block_size=16, num_kv_heads=heads, head_size=128, dtype=torch.bfloat16).page_size_bytes
        assert memory.kv_bytes(model, Engine(dtype="bfloat16", tensor_parallel=split)) * 16 == page * model.text.layers


# Growth of the estimates


def test_more_ranks_never_need_more_and_longer_micro_batches_never_less(workspace: Path) -> None:
    recipe = catalog.load_recipe("recipes/multi_teacher_4b.yaml")
    model, load = read_model(recipe.student.model), Load(4096, 16384, True, 16384)

    def peak(ranks: int, **changes: Any) -> float:
        changed = recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})
        return memory.peak(memory.trainer(model, changed, ranks, load), memory.step_memory(model, changed.train, ranks))

    by_ranks = [peak(n) for n in range(1, 65)]
    assert by_ranks == sorted(by_ranks, reverse=True)
    for key in ("micro_tokens", "micro_patches"):
        growing = [peak(4, **{key: n}) for n in (256, 16384, 20480, 20481, 65536, 262144)]
        assert growing == sorted(growing)
        assert growing[0] == growing[1] < growing[-1], "one response is a micro-batch, however small the budget"
    assert peak(4, gradient_checkpointing=False) > 2 * peak(4)
    assert peak(4, offload=True) < peak(4)


def test_a_plan_says_how_much_memory_of_the_host_an_offload_takes(workspace: Path) -> None:
    parts = plan("cross_modal_4b", "train.offload=true").roles[0].parts
    trained = read_model(workspace / "models/Qwen3-VL-4B-Instruct").parameters / 2  # on each of two ranks
    told = next(part for part in parts if part.what == "host memory")
    assert told.size == 0, "it is none of the GPU's"
    assert float(told.how.split()[0]) == pytest.approx((2 + 2 + 4 + 12) * trained / GIB, rel=0.01)
    assert not any(part.what == "host memory" for part in plan("cross_modal_4b").roles[0].parts)


def test_a_plan_counts_the_tiles_of_a_gpu_wherever_it_is_made(workspace: Path) -> None:
    recipe = catalog.load_recipe("recipes/cross_modal_4b.yaml", overrides=["train.freeze=[language]"])
    model = read_model(recipe.student.model, recipe.train)
    assert memory.head(model, recipe, tokens=0) == 4 * 2048 * 4096 * 4


def test_the_demo_is_planned_too(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "text_teacher", "image_teacher"):
        (tmp_path / ".mmopd/demo" / name).mkdir(parents=True)
        (tmp_path / ".mmopd/demo" / name / "config.json").write_bytes((tiny / "config.json").read_bytes())
    recipe: Recipe = catalog.load_recipe("recipes/demo.yaml")
    done = budget(recipe, Machines(H100))
    assert done.refusals == []
    assert sum(done.roles[0].parts[i].size for i in range(4)) < GIB / 100


if __name__ == "__main__":
    measure(Path(sys.argv[1]), Path(sys.argv[2]))
