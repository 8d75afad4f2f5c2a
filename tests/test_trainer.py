"""The trainer in separate processes, as in a run: one rank, two ranks, and two that resume."""

import json
import queue
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from student_worker import plain_logprobs, plain_update
from train_worker import BATCHES, TRAIN, launch, make_items
from transformers import AutoProcessor, GenerationConfig, Qwen3VLForConditionalGeneration

from mmopd.config import Train
from mmopd.demo.world import build_student
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.runtime.watchdog import HUNG
from mmopd.train.checkpoint import Checkpoints
from mmopd.train.pack import MicroBatch
from mmopd.train.students import load_student
from mmopd.train.trainer import Trainer, learning_rate_factor

PARTS = ("vision", "projector", "language")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def model(out: Path) -> Path:
    build_student(out / "model")
    return out / "model"


@pytest.fixture(scope="module")
def two(server: None, model: Path, out: Path) -> dict[str, Any]:
    return launch(model, out / "two", "straight", 2)


@pytest.fixture(scope="module")
def one(server: None, model: Path, out: Path) -> dict[str, Any]:
    return launch(model, out / "one", "straight", 1)


@pytest.fixture(scope="module")
def resumed(model: Path, out: Path, two: dict[str, Any], resized: list[dict[str, Any]]) -> dict[str, Any]:
    checkpoint, broken = out / "two" / "checkpoints" / "step-00000002", out / "two" / "broken"
    for name in ("a-flipped", "b-cut", "c-missing", "d-torn"):
        shutil.copytree(checkpoint, broken / name)
    flipped = next((broken / "a-flipped").glob("zero/*optim_states.pt"))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    cut = broken / "b-cut" / "state.json"
    cut.write_bytes(cut.read_bytes()[:-1])
    (broken / "c-missing" / "random-00001.pt").unlink()
    (broken / "d-torn" / "manifest.json").unlink()
    return launch(model, out / "two", "resumed", 2)


@pytest.fixture(scope="module")
def resized(model: Path, out: Path, two: dict[str, Any]) -> list[dict[str, Any]]:
    shutil.copytree(out / "two" / "checkpoints" / "step-00000002", out / "resized" / "checkpoints" / "step-00000002")
    return [launch(model, out / "resized", "resized", size) for size in (1, 2)]


def test_one_rank_and_two_ranks_agree_in_loss_and_gradient_norm(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert any(a["micro_steps"] != b["micro_steps"] for a, b in zip(one["stats"], two["stats"], strict=True))
    for a, b in zip(one["stats"], two["stats"], strict=True):
        for name in ("loss", "grad_norm", "mismatch", "clip_fraction", "tokens", "lr"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-7), name


def test_loss_and_gradient_norm_are_those_of_plain_transformers_however_samples_are_packed(
    model: Path, one: dict[str, Any], two: dict[str, Any]
) -> None:
    encoder = Encoder(model)
    expected = plain_update(
        Qwen3VLForConditionalGeneration.from_pretrained(model), encoder, make_items(encoder, BATCHES[0], 0), PARTS
    )
    for ranks, found in ((1, one["others"]), (2, two["others"])):
        assert found["one_row"]["stats"]["micro_steps"] == 1
        assert found["apart"]["stats"]["micro_steps"] == -(-9 // ranks)
        assert len(set(found["apart"]["ran"])) > 3
        for name in ("plain", "one_row", "apart"):
            assert {key: found[name]["stats"][key] for key in expected} == pytest.approx(expected, rel=1e-5), name
            near(found[name], found["plain"])


def test_one_micro_batch_is_made_while_the_one_before_it_is_computed_and_no_more() -> None:
    trainer, made = Trainer.__new__(Trainer), queue.Queue[int]()
    trainer.ranks = SimpleNamespace(device=torch.device("cpu"))  # type: ignore[assignment]

    def collate(items: list[Any], chosen: list[int]) -> MicroBatch:
        made.put(chosen[0])
        if chosen[0] == 4:
            raise ValueError("an image is broken")
        return MicroBatch({}, 0, *[torch.zeros(1)] * 3, chosen)

    trainer._collate = collate  # type: ignore[assignment]
    micros = trainer._micro_batches([], [[i] for i in range(5)])
    assert made.empty()
    for i in range(4):
        assert next(micros).order == [i]
        assert [made.get(timeout=9) for _ in range(2 - (i > 0))] == [i, i + 1][i > 0 :]
        assert made.empty()
    with pytest.raises(ValueError, match="an image is broken"):
        next(micros)


def test_the_gradient_is_clipped_to_the_norm_that_is_set_and_told_before_it(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    for found in (one["others"], two["others"]):
        plain, clipped = found["plain"], found["clipped"]
        assert plain["stats"]["grad_norm"] > 2
        assert clipped["stats"]["grad_norm"] == plain["stats"]["grad_norm"]
        assert float(plain["gradient"].norm()) == pytest.approx(TRAIN.grad_clip, rel=1e-3)
        assert float(clipped["gradient"].norm()) == pytest.approx(1e-3, rel=1e-3)
        torch.testing.assert_close(clipped["gradient"] * 1e3, plain["gradient"], rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_computes_twice_and_changes_no_gradient(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    for found in (one["others"], two["others"]):
        assert found["checkpointed"]["ran"] == [tokens for tokens in found["plain"]["ran"] for _ in range(2)]
        near(found["checkpointed"], found["plain"])


def test_a_step_recomputes_the_log_probs_and_each_minibatch_starts_from_them(
    one: dict[str, Any], two: dict[str, Any]
) -> None:
    for found in (one["learned"], two["learned"]):
        batch, updates = found["batch"], found["updates"]
        sampled = torch.tensor([x for sample in found["samples"] for x in sample.response.logprobs])
        gaps = (torch.cat(found["truth"]) - sampled).abs()
        assert gaps.max() > 0.5
        assert found["seen"]["mismatch"] == pytest.approx(float(gaps.max()))
        assert found["seen"]["mismatch_mean"] == pytest.approx(float(gaps.mean()))
        torch.testing.assert_close(batch.old, torch.cat(found["truth"]))
        assert [len(items) for items, _ in found["met"]] == [4, 4]
        assert updates[0]["mismatch"] < 1e-5
        assert updates[0]["clip_fraction"] == 0
        assert updates[1]["mismatch"] > 0.1  # the first update has changed them
        for (items, now), stats in zip(found["met"], updates, strict=True):
            old, A, w = (torch.cat([getattr(item, name) for item in items]) for name in ("old", "advantage", "weight"))
            rho, low, high = (torch.cat(now) - old).exp(), 0.8, 1.28
            assert stats["loss"] == pytest.approx(
                -float((w * torch.minimum(rho * A, rho.clamp(low, high) * A)).sum()), rel=1e-5
            )
            clipped = ((rho > high) & (A > 0)) | ((rho < low) & (A < 0))
            assert stats["clip_fraction"] == pytest.approx(float(clipped.float().mean()))
        assert 0 < updates[1]["clip_fraction"] < 1


def test_updates_too_small_for_bfloat16_add_up_in_float32_masters(one: dict[str, Any], two: dict[str, Any]) -> None:
    for found in (one["fine"], two["fine"]):
        start, first, last, skipped = found["states"]
        for masters, weights in found["states"]:
            assert masters.dtype == torch.float32
            assert torch.equal(masters.bfloat16(), weights)
        large = start[0].abs() > 0.02  # 1e-5 is less than half a step of bfloat16 there
        trained = large & (first[0] != start[0])
        assert trained.sum() > 1000
        assert (first[1] != start[1])[large].float().mean() < 1e-3
        assert (last[1] != start[1])[trained].float().mean() > 0.2
        assert (last[0] - start[0])[trained].abs().mean() > 4 * (first[0] - start[0])[trained].abs().mean()
        assert found["losses"][-1] < found["losses"][0] - 0.1
        assert found["skipped"].startswith("a gradient is not finite")
        assert torch.equal(skipped[0], last[0])
    assert one["fine"]["losses"] == pytest.approx(two["fine"]["losses"], rel=0.02)


def test_log_probs_are_those_of_the_plain_model(model: Path, one: dict[str, Any], two: dict[str, Any]) -> None:
    plain = Qwen3VLForConditionalGeneration.from_pretrained(model)
    expected = plain_logprobs(plain, Encoder(model))
    for found in (one["before"], two["before"]):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gathered_weights_have_the_names_of_the_checkpoint(model: Path, two: dict[str, Any]) -> None:
    names = {name for name, _ in Qwen3VLForConditionalGeneration.from_pretrained(model).named_parameters()}
    assert set(two["names"]) == names
    assert len(two["names"]) == len(names)


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(two: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert resumed["state"] == {"position": 17}
    for a, b in zip(two["stats"][2:], resumed["stats"], strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert all(torch.equal(a, b) for a, b in zip(two["after"], resumed["after"], strict=True))


def test_a_checkpoint_that_is_not_whole_is_refused_and_its_file_named(resumed: dict[str, Any]) -> None:
    flipped, cut, missing, torn = resumed["errors"]
    assert "optim_states.pt: its content has changed" in flipped
    assert "state.json:" in cut
    assert "bytes, saved with" in cut
    assert "random-00001.pt: missing" in missing
    assert "manifest.json: missing or unreadable" in torn


def test_old_checkpoints_are_pruned(resumed: dict[str, Any]) -> None:
    assert resumed["kept"] == ["step-00000003", "step-00000004"]
    assert resumed["best"] == [
        "step-00000002",
        "step-00000003",
        "step-00000005",
    ]  # 0.7 and 0.5 of 0.2, none, 0.7, 0.5, 0.1; and the newest


@pytest.mark.usefixtures("server")
def test_a_checkpoint_that_does_not_fit_is_refused_removed_and_the_one_before_it_stays(model: Path, out: Path) -> None:
    ended = launch(model, out / "full", "full", 2)
    found = torch.load(out / "full" / "full-0.pt")
    needs = float(found["told"].partition("a checkpoint needs ")[2].split()[0]) * 2**30
    assert found["told"].startswith("no checkpoint was written")
    assert f"{out}/full/checkpoints has 9.31e-06 GiB free" in found["told"]
    assert 0.9 < found["size"] / needs < 1.1
    assert found["left"] == ["step-00000001"]
    assert 0 not in ended["codes"]
    assert "CheckpointError: the checkpoint of step 3 was not written" in ended["logs"][1]
    assert "CheckpointError" not in ended["logs"][0]
    assert Checkpoints(out / "full" / "checkpoints", keep=2).latest() == out / "full" / "checkpoints" / "step-00000001"


@pytest.mark.usefixtures("server")
def test_a_rank_that_hangs_ends_itself_and_says_where_and_the_others_wait_no_longer_than_the_timeout(
    model: Path, out: Path
) -> None:
    ended = launch(model, out / "hanging", "hanging", 2)
    waited, hung = ended["logs"]
    assert ended["codes"][1] == HUNG
    assert "rank 1 has made no progress for 2" in hung
    assert "at step 7, update; it was here:" in hung
    assert "in fall_asleep" in hung
    assert "most recent call first" in hung  # the stacks of all threads
    assert ended["codes"][0] not in (0, HUNG)
    assert "has made no progress" not in waited


def test_the_latest_checkpoint_is_the_newest_that_is_whole(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "none", keep=1).latest() is None
    for name in ("step-00000001", "step-00000002", "step-00000010", ".step-00000011.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}", encoding="utf-8")
        (tmp_path / name / "manifest.json").write_text(json.dumps({"state.json": [2, ""]}), encoding="utf-8")
    (tmp_path / "step-00000010" / "state.json").write_text("{", encoding="utf-8")
    assert Checkpoints(tmp_path, keep=1).latest() == tmp_path / "step-00000002"


def test_what_cannot_be_pruned_harms_no_checkpoint(tmp_path: Path) -> None:
    for step in range(1, 4):  # no manifest or score: left by a prune that could not remove all
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "step-00000001" / "zero").write_text("", encoding="utf-8")
    Checkpoints(tmp_path, keep=1, best=1)._prune()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_then_with_two(
    two: dict[str, Any], resized: list[dict[str, Any]]
) -> None:
    for straight, found in zip(two["stats"][2:], resized, strict=True):
        assert found["state"] == {"position": 17}
        assert found["decay"] == [0.1, 0.0]
        for name in ("loss", "grad_norm", "mismatch", "clip_fraction", "tokens", "lr"):
            assert found["stats"][name] == pytest.approx(straight[name], rel=1e-5, abs=1e-7), name
    assert resized[1]["left"] == ["step-00000002", "step-00000003", "step-00000004"]
    for a, b in zip(two["after"], resized[1]["after"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_update_that_is_not_finite_is_skipped_as_if_it_had_not_been_tried(resumed: dict[str, Any]) -> None:
    # the test above shows that it left no trace: the steps around it equal those of a run without it
    for loss, gradient in (resumed["skipped"][:2], resumed["skipped"][2:]):
        assert loss == "the loss is -inf"
        assert gradient.startswith("a gradient is not finite (loss ")


def test_the_export_loads_completely_and_is_the_trained_model(two: dict[str, Any], out: Path, model: Path) -> None:
    folder = out / "two" / "export"
    exported, report = Qwen3VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"] == [
        "Qwen3VLForConditionalGeneration"
    ]
    assert GenerationConfig.from_pretrained(folder).to_dict() == GenerationConfig.from_pretrained(model).to_dict()
    assert (
        AutoProcessor.from_pretrained(folder).tokenizer.get_vocab()
        == AutoProcessor.from_pretrained(model).tokenizer.get_vocab()
    )
    for ours, theirs in zip(two["after"], plain_logprobs(exported, Encoder(folder)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_warm_up_starts_above_zero_and_ends_at_the_full_rate() -> None:
    factor = learning_rate_factor(Train(steps=10, warmup=4))
    assert [round(factor(k), 3) for k in range(6)] == [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_fall_from_the_full_rate_towards_zero(schedule: Any) -> None:
    factor = learning_rate_factor(Train(steps=5, minibatches=2, warmup=2, schedule=schedule))
    rates = [factor(k) for k in range(2, 11)]
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert rates[4] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0)


def test_a_folder_that_is_no_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read a model configuration"):
        load_student(tmp_path, torch.float32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(UserError, match="no student class for model_type 'llama'; known: qwen3_vl"):
        load_student(tmp_path, torch.float32)


def near(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Check that gradients are the same up to the order of sums."""
    torch.testing.assert_close(
        ours["gradient"], theirs["gradient"], rtol=1e-4, atol=1e-6 * float(theirs["gradient"].abs().max())
    )
