"""On-policy distillation: the arrays that the trainer gets, computed by hand, and what must not change them."""

import math

import pytest
import torch
from annotations import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from mmopd.algorithm import balance_online, clipped_loss, margin_mask, margin_shift, opd
from mmopd.algorithm.objectives import OBJECTIVES
from mmopd.algorithm.settings import Algorithm, Balance, Margin

NAN = float("nan")
PLAIN = Algorithm(balance=None, margin=None)


def step(rewards, outcome, group, weight=None, *, settings=PLAIN, seed=0):
    """Apply `opd` to token rewards of each response; the student's log-probs are invented, the teacher's follow from
    them.
    """
    lengths = torch.tensor([len(r) for r in rewards])
    student = -torch.arange(1, int(lengths.sum()) + 1, dtype=torch.float64) / 7
    teacher = student + torch.tensor([x for r in rewards for x in r], dtype=torch.float64)
    return opd(
        teacher,
        student,
        torch.arange(len(rewards)).repeat_interleave(lengths),
        outcome=torch.tensor(outcome, dtype=torch.float32),
        group=torch.tensor(group),
        weight=torch.tensor(weight or [1.0] * len(rewards)),
        settings=settings,
        seed=seed,
    )


# Returns of the worked example of the margins: 0.10, -0.30, 0.20, 0.00, from 2, 1, 4 and 1 tokens.
WORKED = [[0.3, -0.1], [-0.3], [0.2, 0.6, 0.0, 0.0], [0.0]]


def test_plain_opd_is_the_log_ratio_and_a_mean_of_means():
    out = step(WORKED, [1, 1, 0, 0], [0] * 4)
    assert out.advantage.tolist() == pytest.approx([0.3, -0.1, -0.3, 0.2, 0.6, 0.0, 0.0, 0.0])
    assert out.token_weight.tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 4, *[1 / 16] * 4, 1 / 4])
    assert out.keep.all()
    assert out.diagnostics["reverse_kl"] == pytest.approx(-0.7 / 8)
    assert out.diagnostics["return_mean"] == pytest.approx(0.0)
    assert out.diagnostics["margin_before"] == out.diagnostics["margin_after"] == pytest.approx(-0.2)


def test_a_shift_goes_onto_every_token():
    out = step(WORKED, [1, 1, 0, 0], [0] * 4, settings=Algorithm(balance=None))
    assert out.advantage.tolist() == pytest.approx([0.6, 0.2, 0.0, -0.1, 0.3, -0.3, -0.3, -0.3])
    assert out.token_weight.tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 4, *[1 / 16] * 4, 1 / 4])
    seen = out.diagnostics
    assert (seen["margin_before"], seen["margin_after"]) == pytest.approx((-0.2, 0.4))
    assert (seen["order_before"], seen["order_after"]) == (0, 1)
    assert (seen["order_delta_before"], seen["order_delta_after"]) == (0, 1)
    assert seen["shift_mean"] == pytest.approx(0.3)
    assert (seen["return_right"], seen["return_wrong"]) == pytest.approx((-0.1, 0.1))


def test_a_mask_drops_responses_from_the_loss_and_from_its_mean():
    out = step(WORKED, [1, 1, 0, 0], [0] * 4, settings=Algorithm(balance=None, margin=Margin(kind="mask")))
    assert out.keep.tolist() == [True, False, False, True]
    assert out.token_weight.tolist() == pytest.approx([1 / 4, 1 / 4, *[0] * 5, 1 / 2])
    assert out.diagnostics["masked_share"] == 0.5
    assert out.diagnostics["margin_after"] == pytest.approx(0.1)
    assert out.diagnostics["shift_mean"] == 0


def test_balance_comes_before_the_margin():
    # Three right, one wrong: one right response stays, and the margin is that of the two left.
    rewards, outcome, group = [[0.0], [1.0], [2.0], [1.5]], [1, 1, 1, 0], [5] * 4
    balance = balance_online(
        torch.tensor([1.0, 1, 1, 0]), torch.tensor(group), scope="group", ratio=1.0, tolerance=0.05, seed=3
    )
    out = step(rewards, outcome, group, settings=Algorithm(margin=Margin(direction="lift")), seed=3)
    assert torch.equal(out.keep, balance)
    stays = int(balance[:3].nonzero())
    s = max(0.0, 0.4 - (float(stays) - 1.5))
    assert out.advantage[stays].item() == pytest.approx(stays + s)
    assert out.diagnostics["balanced_away_share"] == 0.5
    assert (out.diagnostics["correct_share"], out.diagnostics["correct_share_kept"]) == (0.75, 0.5)


def test_tokens_far_apart_leave_the_loss_and_the_return():
    out = step(
        [[0.2, 10.0, 0.4], [-10.5, -0.1]], [1, 0], [0, 0], settings=Algorithm(balance=None, margin=Margin(delta=2.0))
    )
    assert out.token_weight.tolist() == pytest.approx([1 / 4, 0, 1 / 4, 0, 1 / 2])
    assert out.diagnostics["margin_before"] == pytest.approx(0.3 + 0.1)
    assert out.diagnostics["token_clipped_share"] == pytest.approx(0.4)
    assert out.diagnostics["reverse_kl"] == pytest.approx(-(0.2 + 0.4 - 0.1) / 3)


def test_a_response_without_tokens_takes_part_in_nothing():
    rewards, outcome, group = [[0.1, 0.2], [11.0], [], [0.4]], [1, 0, 0, 0], [0] * 4
    out = step(rewards, outcome, group, settings=Algorithm())
    assert out.keep.tolist() == [True, False, False, True]
    assert out.token_weight.tolist() == pytest.approx([1 / 4, 1 / 4, 0, 1 / 2])
    assert out.diagnostics["empty_share"] == 0.5
    assert out.diagnostics["balanced_away_share"] == 0


def test_a_step_without_a_token_that_counts_has_no_loss_and_no_reverse_kl():
    out = step([[], [12.0], []], [1, 0, 0], [0] * 3, settings=Algorithm())
    assert not out.keep.any()
    assert out.token_weight.tolist() == [0]
    assert out.diagnostics["empty_share"] == 1
    assert not {"reverse_kl", "return_mean", "margin_before"} & out.diagnostics.keys()


def test_the_log_ratio_of_a_response_is_summed_over_the_tokens_that_count():
    out = step([[0.2, 10.0, 0.4], [], [-0.5]], [1, 0, 0], [0] * 3, settings=Algorithm())
    assert out.log_ratio.tolist() == pytest.approx([0.6, 0, -0.5])
    assert out.counted.tolist() == [2, 0, 1]


def test_teacher_weights_multiply():
    out = step([[0.1], [0.1, 0.1]], [1, 1], [0, 1], weight=[2.0, 0.5])
    assert out.token_weight.tolist() == pytest.approx([1.0, 0.125, 0.125])


@pytest.mark.parametrize(
    "algorithm",
    [
        Algorithm(),
        Algorithm(balance=Balance(scope="batch", ratio=math.inf), margin=Margin(scope="global", direction="lift")),
        Algorithm(balance=Balance(ratio=0), margin=Margin(kind="mask", mode="minmax", retain=0)),
    ],
)
def test_without_known_outcomes_it_is_plain_opd(algorithm):
    full, plain = (step(WORKED, [NAN] * 4, [0] * 4, settings=s) for s in (algorithm, PLAIN))
    assert torch.equal(full.advantage, plain.advantage)
    assert torch.equal(full.token_weight, plain.token_weight)
    assert full.keep.all()
    assert full.diagnostics["unknown_share"] == 1
    assert not {"correct_share", "margin_before", "order_after", "return_right"} & full.diagnostics.keys()
    assert full.diagnostics["two_sided_groups_before"] == 0


def test_soft_outcomes_are_cut_at_the_threshold_of_the_settings():
    settings = Algorithm(balance=None, outcome_threshold=0.8)
    soft, hard = (step(WORKED, o, [0] * 4, settings=settings) for o in ([0.9, 0.8, 0.7, 0.0], [1, 1, 0, 0]))
    assert torch.equal(soft.advantage, hard.advantage)


def test_an_empty_step_is_fine():
    none, index = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    out = opd(none, none, index, outcome=none, group=index, weight=none, settings=Algorithm(), seed=0)
    assert out.token_weight.shape == (0,)
    assert out.diagnostics["responses"] == 0


def test_diagnostics_are_plain_finite_floats():
    for outcome in ([1, 1, 0, 0], [1, 1, 1, 1], [NAN] * 4):
        for value in step(WORKED, outcome, [0, 0, 0, 1], settings=Algorithm()).diagnostics.values():
            assert type(value) is float
            assert math.isfinite(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.tensor([-1.0, NAN, -1])}, r"teacher log-prob of token 1 \(response 0\) is nan"),
        ({"student": torch.tensor([-1.0, -1, -math.inf])}, r"student log-prob of token 2 \(response 1\) is -inf"),
        ({"teacher": torch.tensor([math.inf, -1, -1])}, r"teacher log-prob of token 0 \(response 0\) is inf"),
        ({"teacher": torch.tensor([-1.0, math.inf, -math.inf])}, r"teacher log-prob of token 1 \(response 0\) is inf"),
        (
            {"reference": torch.tensor([-1.0, -1, NAN]), "scale": 1.25},
            r"reference log-prob of token 2 \(response 1\) is nan",
        ),
        ({"weight": torch.tensor([1.0, NAN])}, r"weight\[1\] is nan: expected a number >= 0"),
        ({"weight": torch.tensor([-1.0, 1])}, r"weight\[0\] is -1"),
        ({"weight": torch.tensor([math.inf, 1])}, r"weight\[0\] is inf"),
        ({"response": torch.tensor([0, 0, 2])}, r"response\[2\] is 2, but there are 2"),
        ({"response": torch.tensor([0, -1, 1])}, r"response\[1\] is -1"),
        ({"outcome": torch.tensor([1.0, 7.0])}, r"outcome\[1\] is 7"),
        ({"weight": torch.tensor([1.0])}, "one length"),
        ({"student": torch.tensor([-1.0])}, "one length"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "teacher": torch.tensor([-1.0, -1, -1]),
        "student": torch.tensor([-2.0, -1, -1]),
        "response": torch.tensor([0, 0, 1]),
        "outcome": torch.tensor([1.0, 0]),
        "group": torch.tensor([0, 0]),
        "weight": torch.ones(2),
    }
    with pytest.raises(ValueError, match=message):
        unchecked(opd)(**(good | change), settings=Algorithm(), seed=0)


@st.composite
def steps(draw):
    """Draw (rewards, outcome, group) of a step."""
    n = draw(st.integers(1, 10))
    reward = st.one_of(st.integers(-60, 60).map(lambda i: i / 30), st.sampled_from([10.0, -25.0]))
    rewards = draw(st.lists(st.lists(reward, max_size=5), min_size=n, max_size=n))
    outcome = draw(st.lists(st.sampled_from([0.0, 1.0, 0.7, NAN]), min_size=n, max_size=n))
    return rewards, outcome, draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))


ALGORITHMS = st.builds(
    Algorithm,
    balance=st.one_of(
        st.none(), st.builds(Balance, scope=st.sampled_from(["group", "batch"]), ratio=st.sampled_from([0.0, 1.0, 2.0]))
    ),
    margin=st.one_of(
        st.none(),
        st.builds(
            Margin,
            kind=st.sampled_from(["shift", "mask"]),
            scope=st.sampled_from(["group", "global"]),
            mode=st.sampled_from(["mean", "minmax"]),
        ),
    ),
)


@settings(max_examples=100, deadline=None)
@given(steps(), ALGORITHMS)
def test_weights_are_a_mean_of_means_and_the_parts_are_the_pure_functions(batch, algorithm):
    rewards, outcome, group = batch
    out = step(*batch, settings=algorithm, seed=5)
    lengths = torch.tensor([len(r) for r in rewards])
    per_response = [w.sum().item() for w in out.token_weight.split(lengths.tolist())]
    kept = int(out.keep.sum())
    assert per_response == pytest.approx([float(k) / max(1, kept) for k in out.keep], abs=1e-6)

    valid = [[r for r in rs if abs(r) < 10] for rs in rewards]
    alive = torch.tensor([len(v) > 0 for v in valid])
    R = torch.tensor([sum(v) / max(1, len(v)) for v in valid], dtype=torch.float64)
    o, g, keep = torch.tensor(outcome), torch.tensor(group), alive.clone()
    if b := algorithm.balance:
        keep[alive] = balance_online(o[alive], g[alive], scope=b.scope, ratio=b.ratio, tolerance=b.tolerance, seed=5)
    if (m := algorithm.margin) and m.kind == "mask":
        now = keep.clone()
        keep[now] = margin_mask(R[now], o[now], g[now], scope=m.scope, mode=m.mode, delta=m.delta, retain=m.retain)
    assert torch.equal(out.keep, keep)
    shift = torch.zeros_like(R)
    if m and m.kind == "shift":
        shift[keep] = margin_shift(
            R[keep], o[keep], g[keep], scope=m.scope, mode=m.mode, direction=m.direction, delta=m.delta
        )
    expected = [r + s for rs, s in zip(rewards, shift.tolist(), strict=True) for r in rs]
    assert out.advantage.tolist() == pytest.approx(expected, abs=1e-6)


def test_clipped_loss_by_hand():
    rho = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5], dtype=torch.float64)
    advantage = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    old = torch.full((5,), -3.0, dtype=torch.float64)
    weight = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2], dtype=torch.float64)
    logprob = (old + rho.log()).requires_grad_()
    loss = clipped_loss(logprob, old, advantage, weight, clip_low=0.2, clip_high=0.28)
    # 2 | 1.28 (clipped) | -1.5 | 0.5 | -0.8 (clipped)
    assert loss.item() == pytest.approx(-(0.1 * 2 + 0.2 * 1.28 - 0.3 * 1.5 + 0.2 * 0.5 - 0.2 * 0.8))
    loss.backward()
    assert logprob.grad.tolist() == pytest.approx([-0.2, 0.0, 0.45, -0.1, 0.0])


def test_on_policy_the_gradient_is_minus_weight_times_advantage():
    logprob = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantage, weight = torch.tensor([0.5, -0.25, 4.0]), torch.tensor([0.5, 0.25, 0.25])
    clipped_loss(logprob, logprob.detach(), advantage, weight, clip_low=0.2, clip_high=0.28).backward()
    assert torch.equal(logprob.grad, -advantage * weight)


def test_a_token_of_weight_zero_is_out_of_the_loss_whatever_it_holds():
    logprob = torch.tensor([-1.0, 0.0, -math.inf], requires_grad=True)
    old = torch.tensor([-1.0, -1e4, -math.inf])
    loss = clipped_loss(logprob, old, torch.ones(3), torch.tensor([1.0, 0.0, 0.0]), clip_low=0.2, clip_high=0.28)
    loss.backward()
    assert loss.item() == -1
    assert logprob.grad.tolist() == [-1, 0, 0]


def test_losses_of_micro_batches_add_up_to_that_of_the_batch():
    out = step(WORKED, [1, 1, 0, 0], [0] * 4, settings=Algorithm())
    old = -torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    new = old + 0.5 * torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = clipped_loss(new, old, out.advantage, out.token_weight, clip_low=0.2, clip_high=0.28)
    parts = [
        clipped_loss(new[i:j], old[i:j], out.advantage[i:j], out.token_weight[i:j], clip_low=0.2, clip_high=0.28)
        for i, j in ((0, 2), (2, 3), (3, 8))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_sums_over_no_tokens_are_float64():
    none = torch.zeros(0)
    out = opd(
        none,
        none,
        torch.zeros(0, dtype=torch.long),
        outcome=torch.ones(2),
        group=torch.zeros(2, dtype=torch.long),
        weight=torch.ones(2),
        settings=Algorithm(),
        seed=0,
    )
    assert out.log_ratio is not None
    assert out.log_ratio.dtype == torch.float64
    assert out.log_ratio.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_annotations_of_every_objective_are_checked(kind):
    objective = Algorithm.model_validate(
        {"objective": {"kind": kind} | ({"reference": "base"} if kind == "exopd" else {})}
    ).objective
    with pytest.raises(TypeCheckError):
        objective.targets("no step")
    with pytest.raises(TypeCheckError):
        objective.loss("no tokens", Algorithm())
