"""Learning from tokens that older weights, or another engine's arithmetic, sampled: weights by hand, and contradictory
settings.
"""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmopd import catalog
from mmopd.algorithm.settings import Algorithm
from mmopd.demo.world import build_processor
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.records import Encoded, Outcome, Prompt, Response, Sample, Score
from mmopd.train.batch import build_batch, minibatches
from mmopd.train.recompute import recompute

PLAIN = Algorithm(balance=None, margin=None, visual=None, ratio_cap=2.0)


def sample(sampled: tuple[float, ...], teacher: tuple[float, ...]) -> Sample:
    tokens = tuple(range(len(sampled)))
    return Sample(0, Response(tokens, sampled, "", "stop", (("step-3", 2),)), Outcome(1.0), Score("t", teacher))


def test_a_token_counts_as_often_as_it_is_likelier_now_up_to_the_cap() -> None:
    samples = [sample((-1.0, -1.0, -1.0), (-0.2, -0.2, -0.2)), sample((-2.0,), (-1.0,))]
    old = [torch.tensor([-0.5, -3.0, -0.1]), torch.tensor([-2.0])]
    plain, batch = build_batch(samples, PLAIN, 0), build_batch(samples, PLAIN, 0, old)
    assert plain.targets.token_weight.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    ratio = [math.exp(0.5), math.exp(-2.0), 2.0, 1.0]  # the third is exp(0.9) = 2.46 times as likely
    assert batch.targets.token_weight.tolist() == pytest.approx(
        [w * r for w, r in zip([1 / 6] * 3 + [1 / 2], ratio, strict=True)]
    )
    assert batch.targets.advantage.tolist() == pytest.approx(
        [0.3, 2.8, -0.1, 1.0]
    )  # log pi_T - log pi_theta of the current student
    assert plain.targets.advantage.tolist() == pytest.approx([0.8, 0.8, 0.8, 1.0])


def test_the_clipped_ratio_starts_from_the_recomputed_log_probs(tmp_path: Path) -> None:
    build_processor().save_pretrained(tmp_path)
    encoded = Encoder(tmp_path).encode(Prompt("s/0", "t", "text", ({"role": "user", "content": "1+1"},), (), "2"))
    samples, old = [sample((-1.0, -1.0), (-0.2, -0.2))], [torch.tensor([-0.5, -3.0])]
    (items,) = minibatches(build_batch(samples, PLAIN, 0, old), [encoded], 1)
    assert torch.equal(items[0].old, old[0])
    (items,) = minibatches(build_batch(samples, PLAIN, 0), [encoded], 1)
    assert items[0].old.tolist() == [-1.0, -1.0]


def test_recomputed_log_probs_stay_with_their_samples_where_others_have_no_score() -> None:
    scored, unscored = (
        sample((-1.0,), (-0.2,)),
        Sample(0, Response((1, 2), (-1.0, -1.0), "", "stop", (("step-3", 2),)), Outcome(0.0), None),
    )
    batch = build_batch([unscored, scored], PLAIN, 0, [torch.tensor([-9.0, -9.0]), torch.tensor([-0.5])])
    assert batch.old.tolist() == [-0.5]
    assert batch.targets.advantage.tolist() == pytest.approx([0.3])


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_where_one_of_the_recomputed_is_not_finite_the_update_meets_it_and_not_the_statistics(broken: float) -> None:
    prompt, samples = (
        Encoded(Prompt("s/0", "t", "text", (), (), ""), (1,), (1,), ()),
        [sample((-1.0, -1.0), (-0.2, -0.2))] * 2,
    )
    for last in (-3.0, broken):
        now = [torch.tensor([-0.5, -2.0]), torch.tensor([-0.5, last])]
        old, seen = recompute(SimpleNamespace(logprobs=lambda items, now=now: now), samples, [prompt])  # type: ignore[arg-type]
        assert old == (now if math.isfinite(last) else None)
        assert seen["mismatch"] == pytest.approx(
            2.0 if math.isfinite(last) else math.nan if math.isnan(last) else math.inf, nan_ok=True
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rollout.async_steps=1", "train.old_logprobs=engine"],
            "train.old_logprobs: with rollout.async_steps the engine's",
        ),
        (
            ["rollout.async_steps=1", "algorithm={objective: {kind: sft}}"],
            "rollout.async_steps: `sft` learns from no rollouts",
        ),
        (
            ["train.old_logprobs=recompute", "algorithm={objective: {kind: sft}}"],
            "train.old_logprobs: `sft` learns from no rollouts",
        ),
        (["rollout.async_steps=2"], "rollout.async_steps: .*0 or 1"),
    ],
)
def test_settings_that_contradict_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        catalog.load_recipe("recipes/demo.yaml", overrides=overrides)


def test_log_probs_are_recomputed_where_asked_and_wherever_rollouts_run_ahead() -> None:
    for overrides, expected in (
        ([], False),
        (["train.old_logprobs=recompute"], True),
        (["rollout.async_steps=1"], True),
    ):
        assert catalog.load_recipe("recipes/demo.yaml", overrides=overrides).recomputes == expected
