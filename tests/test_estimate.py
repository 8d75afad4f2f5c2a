"""`mmopd plan`: the figures that can be proven without a GPU, and the recipes that it refuses.

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
from rich.console import Console
from student_worker import FAMILIES, build
from typer.testing import CliRunner
from waiting import LIMIT

from mmopd import catalog
from mmopd.algorithm.settings import Algorithm
from mmopd.capacity import memory, step_time
from mmopd.capacity.budget import Machines, budget, largest
from mmopd.capacity.memory import GIB, GPUS, Load
from mmopd.capacity.model_size import read_model
from mmopd.capacity.show import show_budget
from mmopd.capacity.step_time import Served
from mmopd.cli import app
from mmopd.config import Engine, Lora, Recipe, Train
from mmopd.errors import UserError
from mmopd.task.load import load_tasks

RECIPES = ["cross_modal_4b", "multi_teacher_2b", "multi_teacher_4b", "strong_to_weak_text"]
H100 = GPUS["H100-80G"]
TRAINS = {
    "bfloat16": Train(),
    "float32, frozen": Train(dtype="float32", freeze=("vision", "projector")),
    "lora": Train(lora=Lora(rank=4)),
}
VISION = {
    "hidden_size": 1024,
    "depth": 24,
    "intermediate_size": 4096,
    "out_hidden_size": 2560,
    "deepstack_visual_indexes": [5, 11, 17],
}
PUBLISHED: dict[
    str, tuple[float, dict[str, Any], dict[str, Any], bool]
] = {  # 10^9 parameters, text, vision, tied; from the model cards
    "Qwen3-VL-2B-Instruct": (
        2.13,
        {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
        VISION | {"out_hidden_size": 2048},
        True,
    ),
    "Qwen3-VL-4B-Instruct": (
        4.44,
        {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
        VISION,
        True,
    ),
    "Qwen3-VL-8B-Instruct": (
        8.77,
        {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288},
        {
            "hidden_size": 1152,
            "depth": 27,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        False,
    ),
}
STRONG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def write_config(folder: Path, name: str) -> Path:
    """Write only the config.json of a published model."""
    _, text, vision, tied = PUBLISHED[name]
    text = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": tied} | text
    vision = {
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
    } | vision
    folder.mkdir(parents=True)
    whole = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
    }
    (folder / "config.json").write_text(json.dumps(whole | {"text_config": text, "vision_config": vision}))
    return folder


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the configurations that the shipped recipes name, and no weights."""
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen3-VL-2B-Instruct", "Qwen3-VL-4B-Instruct"):
        write_config(tmp_path / "models" / name, name)
    for domain in ("Code", "Math", "Logic", "Document"):
        write_config(tmp_path / f"models/Qwen3-VL-4B-Instruct-{domain}-RL", "Qwen3-VL-4B-Instruct")
    strong = tmp_path / "models/Qwen3-30B-A3B-Instruct-2507"
    strong.mkdir()
    (strong / "config.json").write_text(json.dumps(STRONG))
    return tmp_path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build("qwen3_vl", folder)
    return folder


def plan(name: str, *overrides: str, machines: Machines | None = None, **more: Any) -> Any:
    return budget(catalog.load_recipe(f"recipes/{name}.yaml", overrides=overrides), machines or Machines(H100), **more)


# Parameters of a model


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_count_is_that_of_the_real_model_and_needs_its_config_alone(kind: str, tmp_path: Path) -> None:
    build(kind, tmp_path / "whole")
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.json").write_bytes((tmp_path / "whole/config.json").read_bytes())
    real = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "whole")
    model = read_model(tmp_path / "config")
    assert model.numbers == sum(p.numel() for p in real.parameters())
    assert model.tower == sum(p.numel() for p in real.model.visual.parameters())
    tied = real.config.tie_word_embeddings
    assert model.embedding == (0 if tied else real.get_input_embeddings().weight.numel())
    text = real.config.text_config
    assert (model.active < model.read) == (hasattr(text, "num_experts") and text.num_experts_per_tok < text.num_experts)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_count_of_a_published_configuration_is_the_published_one(name: str, tmp_path: Path) -> None:
    assert read_model(write_config(tmp_path / name, name)).numbers == pytest.approx(PUBLISHED[name][0] * 1e9, rel=0.02)


def test_a_mixture_of_experts_is_counted_whole_and_by_what_a_token_passes(workspace: Path) -> None:
    model = read_model(workspace / "models/Qwen3-30B-A3B-Instruct-2507")
    assert model.numbers == pytest.approx(30.5e9, rel=0.02)  # from the model card
    assert model.active + model.embedding == pytest.approx(3.3e9, rel=0.02)


def test_a_folder_without_a_config_says_that_one_is_enough(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no config\.json, the only file that an estimate needs"):
        read_model(tmp_path / "models/Qwen3-VL-4B-Instruct")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl", "architectures": ["Sys"]}')
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
        out.write_text(json.dumps(found))
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
        subprocess.Popen(command, env=env | {"RANK": str(n), "LOCAL_RANK": str(n)}, stderr=subprocess.PIPE, text=True)
        for n in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=LIMIT)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * ranks, errors[0][-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
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
    trained = read_model(workspace / "models/Qwen3-VL-4B-Instruct").numbers / 2  # on each of two ranks
    told = next(part for part in parts if part.what == "host memory")
    assert told.size == 0, "it is none of the GPU's"
    assert float(told.how.split()[0]) == pytest.approx((2 + 2 + 4 + 12) * trained / GIB, rel=0.01)
    assert not any(part.what == "host memory" for part in plan("cross_modal_4b").roles[0].parts)


def test_a_plan_counts_the_tiles_of_a_gpu_wherever_it_is_made(workspace: Path) -> None:
    recipe = catalog.load_recipe("recipes/cross_modal_4b.yaml", overrides=["train.freeze=[language]"])
    model = read_model(recipe.student.model, recipe.train)
    assert memory.head(model, recipe, tokens=0) == 4 * 2048 * 4096 * 4


def test_servers_are_placed_where_mmopd_train_puts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmopd.serving import placement
    from mmopd.serving.specs import ServerSpec

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for gpus, sizes in ((8, [4, 1, 1]), (4, [2, 1, 1, 2]), (1, [1, 1]), (8, [8, 2])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=gpus: n)
        specs = [ServerSpec(str(i), Path(), Engine(tensor_parallel=n), updatable=False) for i, n in enumerate(sizes)]
        assert list(placement.assign_gpus(specs).values()) == [
            ",".join(map(str, one)) for one in placement.place(sizes, gpus)
        ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,GPU-5e,7")  # a job that has half of a machine
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    two = [ServerSpec(name, Path(), Engine(tensor_parallel=n), updatable=False) for name, n in (("a", 2), ("b", 1))]
    assert placement.assign_gpus(two) == {"a": "7,GPU-5e", "b": "6"}
    assert placement.place([4, 1, 1], 8) == [[7, 6, 5, 4], [3], [2]]
    assert placement.place([1, 1, 2], 4, sharing=[0]) == [[0], [3], [2, 1]]


def test_ranks_fill_the_other_nodes_first_and_rank_0_is_on_the_first() -> None:
    assert memory.ranks_by_node(3, 8, 1) == [3]
    assert memory.ranks_by_node(11, 8, 2) == [3, 8]
    assert memory.ranks_by_node(3, 8, 2) == [1, 2]
    assert memory.ranks_by_node(12, 8, 3) == [1, 8, 3]


# Whole recipes


def test_an_engine_that_sleeps_while_the_trainer_learns_shares_the_gpu_of_rank_0(workspace: Path) -> None:
    apart = plan("multi_teacher_2b")
    shared = ["student.sync=ipc", "student.replicas=1", "student.engine.gpu_share=0.75"]
    together = plan("multi_teacher_2b", *shared)
    assert together.roles[1].where == [(0, 0)]
    assert len({place for role in together.roles for place in role.where}) < len(
        {place for role in apart.roles for place in role.where}
    )
    assert together.refusals == []  # although both peaks together exceed the GPU
    assert together.roles[0].peak + together.roles[1].peak > H100.memory * GIB
    assert any(
        "Trainer" in refusal and "Engine" in refusal for refusal in plan("multi_teacher_2b", *shared[:2]).refusals
    )


def test_rollouts_for_which_an_engine_has_no_time_are_refused(workspace: Path) -> None:
    rolled = next(time.seconds for time in plan("cross_modal_4b").times if time.what == "rollout")
    [refusal] = plan("cross_modal_4b", f"train.timeout={int(rolled) - 1}").refusals
    assert refusal.startswith(
        f"rollouts take {rolled:,.0f} s by this estimate, but train.timeout = {int(rolled) - 1:,} s"
    )


def test_replicas_of_the_student_have_gpus_of_their_own_and_share_the_rollouts(workspace: Path) -> None:
    one, four = (plan("cross_modal_4b", f"student.replicas={n}") for n in (1, 4))
    assert len(one.roles) == len(four.roles)
    assert one.roles[1].where == [(0, 7)]
    assert four.roles[1].where == [(0, 7), (0, 6), (0, 5), (0, 4)]
    assert four.roles[1].peak == one.roles[1].peak
    assert four.roles[1].title == "Engine of the student, 4 replicas, on each of 4 GPUs"
    rolled = [next(time.seconds for time in done.times if time.what == "rollout") for done in (one, four)]
    assert 1 < rolled[0] / rolled[1] <= 4


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_fits_the_machine_that_it_names_and_no_small_one(name: str, workspace: Path) -> None:
    done = plan(name)
    assert done.refusals == []
    used = [place for role in done.roles for place in role.where]
    assert sorted(used) == [(0, gpu) for gpu in range(8)], "each of 8 GPUs has one thing on it"
    small = plan(name, machines=Machines(memory.Gpu("small", 24, 150, 1000)))
    assert any("GiB more than 24 GiB" in refusal for refusal in small.refusals)


@pytest.mark.parametrize("name", RECIPES)
def test_the_largest_sample_of_a_shipped_recipe_fits_its_contexts(name: str, workspace: Path) -> None:
    recipe = catalog.load_recipe(f"recipes/{name}.yaml")
    student = Served("student", (), "student.engine", read_model(recipe.student.model), recipe.student.engine, [])
    load = largest(recipe, catalog.load_mixture(recipe.mixture), load_tasks(), [student])
    assert load.tokens <= recipe.student.engine.max_model_len
    assert recipe.fleet is not None
    for teacher in catalog.load_fleet(recipe.fleet).teachers.values():
        assert load.tokens < teacher.engine.max_model_len
    assert load.patches <= recipe.train.micro_patches
    assert load.images == (name != "strong_to_weak_text")


@pytest.mark.parametrize(
    ("overrides", "machines", "message"),
    [
        (["train.ranks=9"], Machines(H100), "train.ranks is 9, but there are only 1 x 8 GPUs: 1 too many"),
        (["train.ranks=1"], Machines(H100), "than 79.6 GiB; raise train.ranks (now 1), or set train.offload=true"),
        (["train.gradient_checkpointing=false"], Machines(H100), "set train.gradient_checkpointing=true"),
        (["train.micro_tokens=200000"], Machines(H100), "lower train.micro_tokens (now 200,000)"),
        (
            ["rollout.max_tokens=20000"],
            Machines(H100),
            "student: a prompt of 2,048 and a response of 20,000 tokens need 22,048",
        ),
        (
            ["student.engine.kv_cache_mib=100"],
            Machines(H100),
            "student: the KV cache is 2.5 GiB too small for one sequence",
        ),
        (
            ["student.engine.tensor_parallel=3"],
            Machines(H100),
            "32 heads do not split over tensor_parallel=3 (student.engine)",
        ),
        ([], Machines(H100, gpus=4), "or take more GPUs"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_key_to_change(
    overrides: list[str], machines: Machines, message: str, workspace: Path
) -> None:
    assert any(message in refusal for refusal in plan("cross_modal_4b", *overrides, machines=machines).refusals)


def test_a_teacher_whose_log_probs_do_not_fit_beside_its_share_is_refused(workspace: Path) -> None:
    fleet = (catalog.shipped() / "teachers/cross_modal.yaml").read_text()
    (workspace / "teachers").mkdir()
    (workspace / "teachers/mine.yaml").write_text(
        fleet.replace("max_num_seqs: 32", "max_num_seqs: 32, gpu_share: 0.95")
    )
    refusals = plan("cross_modal_4b", "fleet=teachers/mine.yaml").refusals
    assert len(refusals) == 2
    assert "lower gpu_share (now 0.95) of teachers.math.engine, or --max-num-batched-tokens (now 8,192)" in refusals[0]
    smaller = "max_num_seqs: 32, gpu_share: 0.95, extra_args: [--max-num-batched-tokens, '2048']"
    (workspace / "teachers/mine.yaml").write_text(fleet.replace("max_num_seqs: 32", smaller))
    assert plan("cross_modal_4b", "fleet=teachers/mine.yaml").refusals == []


def test_teachers_elsewhere_take_no_gpu_here(workspace: Path) -> None:
    done = plan("multi_teacher_4b", "train.ranks=6", elsewhere=True)
    assert done.refusals == []
    assert done.elsewhere == ["math", "logic", "document"]
    assert any("than 79.6 GiB" in refusal for refusal in plan("multi_teacher_4b", "train.ranks=6").refusals)


def test_time_follows_the_rates_of_the_gpu_and_the_length_of_responses(workspace: Path) -> None:
    def times(**changes: Any) -> dict[str, float]:
        machines = Machines(memory.Gpu("GPU", **({"memory": 80.0, "tflops": 1000.0, "bandwidth": 3000.0} | changes)))
        return {time.what: time.seconds for time in plan("cross_modal_4b", machines=machines).times}

    plain, computes, reads = times(), times(tflops=2000.0), times(bandwidth=6000.0)
    assert computes["update"] == pytest.approx(plain["update"] / 2)
    assert computes["scoring"] == pytest.approx(plain["scoring"] / 2)
    assert computes["rollout"] == plain["rollout"]
    assert reads["rollout"] == pytest.approx(plain["rollout"] / 2)
    assert reads["update"] == plain["update"]
    assert plan("cross_modal_4b", response=1000).step < plan("cross_modal_4b", response=8000).step
    done = plan("cross_modal_4b")
    assert done.step < sum(time.seconds for time in done.times), "teachers score while the student samples"
    ahead, again = (
        plan("cross_modal_4b", "rollout.async_steps=1"),
        plan("cross_modal_4b", "train.old_logprobs=recompute"),
    )
    seconds, before = ({time.what: time.seconds for time in one.times} for one in (ahead, done))
    assert seconds["update"] == pytest.approx(before["update"] * 5 / 4), (
        "one more forward pass beside those of checkpointing"
    )
    assert ahead.step == pytest.approx(
        max(seconds["update"], seconds["rollout"], seconds["scoring"]) + seconds["weight sync"]
    )
    assert ahead.step < again.step


def test_replicas_are_spared_the_all_reduces_of_an_engine_on_several_gpus(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rolled(*overrides: str) -> float:
        return next(time.seconds for time in plan("cross_modal_4b", *overrides).times if time.what == "rollout")

    split, apart = ["student.replicas=1", "student.engine.tensor_parallel=4"], ["student.replicas=4"]
    before = rolled(*split), rolled(*apart)
    monkeypatch.setattr(step_time, "ALL_REDUCE", 2 * step_time.ALL_REDUCE)
    assert rolled(*split) > before[0]
    assert rolled(*apart) == before[1]


def test_a_sync_takes_what_was_trained_over_its_own_link(workspace: Path) -> None:
    def sync(*overrides: str) -> Any:
        done = plan("cross_modal_4b", "student.replicas=1", *overrides)
        return next(time for time in done.times if time.what == "weight sync")

    bytes_of = 2 * read_model(workspace / "models/Qwen3-VL-4B-Instruct").numbers
    gathered, through_host = bytes_of / step_time.PEER, 2 * bytes_of / step_time.HOST
    assert sync().seconds == pytest.approx(gathered + through_host)
    assert sync("student.replicas=4").seconds == sync().seconds, "the engines read the same bytes at the same time"
    assert sync("student.sync=broadcast").seconds == pytest.approx(2 * gathered)
    assert sync("student.sync=broadcast", "student.replicas=4").seconds == pytest.approx(5 * gathered)
    assert sync("student.sync=ipc").seconds > through_host, (
        "an engine that sleeps takes all its weights out of the GPU and back"
    )
    assert "7.5 GiB" in sync("train.freeze=[vision, projector]").how
    assert "6.8 GiB" in sync("train.lora={rank: 8}").how, (
        "adapters are merged: all layers of the language model, without its embedding"
    )


def test_a_teacher_that_sees_images_looks_at_them_and_one_of_text_does_not(workspace: Path) -> None:
    def share(all: float, seen: float) -> float:
        recipe = catalog.load_recipe("recipes/cross_modal_4b.yaml")
        model, work = (
            read_model(recipe.student.model),
            step_time.Work(64, 16, 1000, 8000, Load(2000, 16000, True, 8000)),
        )
        served = Served("math", ("math",), "", model, Engine(), [0])
        return step_time._scoring(H100, [served], work, {"math": step_time.Share(all, seen)}).seconds

    blind, half, whole = share(1.0, 0.0), share(1.0, 0.5), share(1.0, 1.0)
    assert blind < half < whole
    model = read_model(workspace / "models/Qwen3-VL-4B-Instruct")
    patches = 64 * 16 * 1000 * 4
    assert whole - blind == pytest.approx(2 * model.tower * patches / (H100.tflops * 1e12 * step_time.PREFILL))
    assert plan("cross_modal_4b").times[1].how.startswith("math: "), (
        "the code teacher has as many prompts, and no images"
    )


# The command


@pytest.mark.parametrize("name", RECIPES)
def test_show_and_plan_work_on_a_shipped_recipe(name: str, workspace: Path) -> None:
    for command, told in (("show", "Who scores what"), ("plan", "Fits 1 x 8 H100-80G")):
        done = CliRunner().invoke(app, [command, f"recipes/{name}.yaml"])
        assert done.exit_code == 0, done.output
        assert told in done.output


def test_the_command_prints_tables_that_fit_and_ends_with_status_1_where_something_does_not(workspace: Path) -> None:
    fits = CliRunner().invoke(app, ["plan", "recipes/cross_modal_4b.yaml"])
    assert fits.exit_code == 0, fits.output
    assert "Fits 1 x 8 H100-80G" in fits.output
    assert "nothing here has been measured on a GPU" in fits.output
    arguments = ["--gpu-memory", "24", "--tflops", "100", "--bandwidth", "900"]
    refused = CliRunner().invoke(app, ["plan", "recipes/cross_modal_4b.yaml", *arguments])
    assert refused.exit_code == 1
    assert "Does not fit:" in refused.output
    with pytest.raises(UserError, match="together"):
        CliRunner().invoke(app, ["plan", "recipes/cross_modal_4b.yaml", *arguments[:2]], catch_exceptions=False)
    with pytest.raises(UserError, match="--gpu H100: not known; did you mean 'H100-80G'"):
        CliRunner().invoke(app, ["plan", "recipes/cross_modal_4b.yaml", "--gpu", "H100"], catch_exceptions=False)


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_is_cut_off_at_100_columns(name: str, workspace: Path) -> None:
    console = Console(width=100)
    with console.capture() as capture:
        show_budget(plan(name), console)
    assert "…" not in capture.get()
    assert max(map(len, capture.get().splitlines())) <= 100


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
