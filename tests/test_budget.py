"""`mmopd plan`: where servers and ranks are placed, the time of a step, refusals and the printed tables."""

from pathlib import Path
from typing import Any

import pytest
import torch
from published import H100, RECIPES, TEXT_RECIPES, plan, write_models
from rich.console import Console
from typer.testing import CliRunner

from mmopd import catalog
from mmopd.capacity import memory, step_time
from mmopd.capacity.budget import Machines, largest
from mmopd.capacity.memory import GIB, Load
from mmopd.capacity.model_size import read_model
from mmopd.capacity.show import show_budget
from mmopd.capacity.step_time import Served
from mmopd.cli import app
from mmopd.config import Engine
from mmopd.errors import UserError
from mmopd.task.load import load_tasks


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_models(tmp_path)


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
    assert load.images == (name not in TEXT_RECIPES)


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


def test_a_teacher_whose_log_probs_do_not_fit_next_to_its_share_is_refused(workspace: Path) -> None:
    fleet = (catalog.shipped() / "teachers/cross_modal.yaml").read_text(encoding="utf-8")
    (workspace / "teachers").mkdir()
    (workspace / "teachers/mine.yaml").write_text(
        fleet.replace("max_num_seqs: 32", "max_num_seqs: 32, gpu_share: 0.95"), encoding="utf-8"
    )
    refusals = plan("cross_modal_4b", "fleet=teachers/mine.yaml").refusals
    assert len(refusals) == 2
    assert "lower gpu_share (now 0.95) of teachers.math.engine, or --max-num-batched-tokens (now 8,192)" in refusals[0]
    smaller = "max_num_seqs: 32, gpu_share: 0.95, extra_args: [--max-num-batched-tokens, '2048']"
    (workspace / "teachers/mine.yaml").write_text(fleet.replace("max_num_seqs: 32", smaller), encoding="utf-8")
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
        "one more forward pass than checkpointing needs"
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

    bytes_of = 2 * read_model(workspace / "models/Qwen3-VL-4B-Instruct").parameters
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
