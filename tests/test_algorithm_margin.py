"""Margin calibration: worked numbers for every mode and direction, and properties that hold for any batch."""

import time

import pytest
import torch
from annotations import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

from mmopd.algorithm import margin_mask, margin_shift, margins

NAN = float("nan")
SCOPES, MODES, DIRECTIONS = ("group", "global"), ("mean", "minmax"), ("lift", "suppress", "spread")
many = settings(max_examples=100, deadline=None)


def tensors(returns, outcome, group, dtype=torch.float32):
    return torch.tensor(returns, dtype=dtype), torch.tensor(outcome, dtype=torch.float32), torch.tensor(group)


# R+ = (0.10, -0.30), R- = (0.20, 0.00), delta = 0.4: margins -0.20 (mean) and -0.50 (minmax), so s = 0.60 and 0.90.
WORKED = tensors([0.10, -0.30, 0.20, 0.00], [1, 1, 0, 0], [7, 7, 7, 7])


@pytest.mark.parametrize(
    ("mode", "direction", "expected"),
    [
        ("mean", "lift", [0.70, 0.30, 0.20, 0.00]),
        ("mean", "suppress", [0.10, -0.30, -0.40, -0.60]),
        ("mean", "spread", [0.40, 0.00, -0.10, -0.30]),
        ("minmax", "lift", [1.00, 0.60, 0.20, 0.00]),
        ("minmax", "suppress", [0.10, -0.30, -0.70, -0.90]),
        ("minmax", "spread", [0.55, 0.15, -0.25, -0.45]),
    ],
)
@pytest.mark.parametrize("scope", SCOPES)
def test_shift_gives_the_worked_numbers(scope, mode, direction, expected):
    shift = margin_shift(*WORKED, scope=scope, mode=mode, direction=direction, delta=0.4)
    torch.testing.assert_close(WORKED[0] + shift, torch.tensor(expected))
    assert margins(WORKED[0] + shift, *WORKED[1:], scope=scope, mode=mode).tolist() == pytest.approx([0.4])


def test_margins_of_the_worked_group():
    assert margins(*WORKED, scope="group", mode="mean").tolist() == pytest.approx([-0.2])
    assert margins(*WORKED, scope="group", mode="minmax").tolist() == pytest.approx([-0.5])


def test_global_scope_takes_the_batch_as_one_group():
    # Group 0 has margin 1.0, group 1 has -1.0. Batch: R+ = (1, 0, 0.3), R- = (0, 1, 0.5), mean margin 1.3/3 - 1.5/3 =
    # -1/15.
    R, o, g = tensors([1, 0, 0, 1, 0.3, 0.5], [1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 2, 3])
    by_group = margin_shift(R, o, g, scope="group", mode="mean", direction="lift", delta=0.4)
    torch.testing.assert_close(by_group, torch.tensor([0, 0, 1.4, 0, 0, 0]))
    whole = margin_shift(R, o, g, scope="global", mode="mean", direction="lift", delta=0.4)
    s = 0.4 + 1 / 15
    torch.testing.assert_close(whole, torch.tensor([s, 0, s, 0, s, 0]))


@pytest.mark.parametrize("mode", MODES)
def test_mask_stops_at_its_floor(mode):
    # Mean: dropping -0.30 gains 0.20, dropping 0.20 gains 0.10; then one of each is left: margin 0.10. Minmax: 0.40,
    # then 0.20: the same.
    keep = margin_mask(*WORKED, scope="group", mode=mode, delta=0.4, retain=0.25)
    assert keep.tolist() == [True, False, False, True]


def test_mask_stops_as_soon_as_the_margin_holds():
    # Mean: R+ = (0.9, 0.8, -0.8), R- = (0.1, 0.0): margin 0.25. Without -0.8 it is 0.80: enough for 0.4.
    R, o, g = tensors([0.9, 0.1, 0.8, -0.8, 0.0], [1, 0, 1, 1, 0], [0] * 5)
    assert margin_mask(R, o, g, scope="group", mode="mean", delta=0.4, retain=0.25).tolist() == [
        True,
        True,
        True,
        False,
        True,
    ]
    assert margin_mask(R, o, g, scope="group", mode="mean", delta=0.25, retain=0.25).all()
    assert margin_mask(R, o, g, scope="group", mode="mean", delta=0.8, retain=0.25).tolist() == [
        True,
        True,
        True,
        False,
        True,
    ]


def test_mask_counts_a_margin_of_delta_as_held_in_the_precision_of_the_returns():
    R, o, g = tensors([0.5, 0.6, 0.1, 0.2], [1, 1, 0, 0], [0] * 4)  # 0.55 - 0.15 is 0.4 minus a rounding error
    assert margin_mask(R, o, g, scope="group", mode="mean", delta=0.4, retain=0.25).all()


def test_mask_breaks_a_tie_by_dropping_the_right_response():
    R, o, g = tensors([0.1, 0.3, 0.3, 0.1], [1, 1, 0, 0], [0] * 4)  # dropping either head gains 0.1
    assert margin_mask(R, o, g, scope="group", mode="mean", delta=0.1, retain=0.25).tolist() == [
        False,
        True,
        True,
        True,
    ]


def test_mask_stops_where_no_drop_raises_the_margin():
    R, o, g = tensors([0.0, 0.0, 1.0, 0.5, 0.5], [1, 1, 1, 0, 0], [0] * 5)
    # Minmax: the worst right response has a twin, and so has the best wrong one.
    assert margin_mask(R, o, g, scope="group", mode="minmax", delta=0.4, retain=0.0).all()


def test_the_floor_is_exact_where_a_computer_rounds():
    right = torch.arange(100.0)
    R, o = torch.cat([right, torch.tensor([200.0])]), torch.cat([torch.ones(100), torch.zeros(1)])
    keep = margin_mask(R, o, torch.zeros(101, dtype=torch.long), scope="group", mode="minmax", delta=0.4, retain=0.29)
    assert keep[:100].sum() == 29  # 0.29 * 100 is 28.999... in floating point


def test_mask_goes_on_with_the_other_side_when_one_is_at_its_floor():
    R, o, g = tensors([-5.0, 0.3, 0.2, 0.1, 0.0], [1, 0, 0, 0, 0], [0] * 5)
    assert margin_mask(R, o, g, scope="group", mode="minmax", delta=0.4, retain=0.5).tolist() == [
        True,
        False,
        False,
        True,
        True,
    ]


def test_soft_outcomes_are_cut_at_the_threshold():
    R, soft, g = tensors([0.10, -0.30, 0.20, 0.00], [0.9, 0.5, 0.49, 0.0], [0] * 4)
    kw = {"scope": "group", "mode": "mean", "direction": "spread", "delta": 0.4}
    assert torch.equal(margin_shift(R, soft, g, **kw), margin_shift(*WORKED, **kw))
    assert margin_shift(R, soft, g, threshold=0.95, **kw).eq(0).all()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mode", MODES)
def test_unknown_outcomes_change_nothing_and_are_left_alone(scope, mode):
    R, o, g = WORKED
    more = (
        torch.cat([R, torch.tensor([9.0, -9.0])]),
        torch.cat([o, torch.tensor([NAN, NAN])]),
        torch.cat([g, torch.tensor([7, 8])]),
    )
    shift = margin_shift(*more, scope=scope, mode=mode, direction="spread", delta=0.4)
    assert shift[4:].tolist() == [0, 0]
    assert torch.equal(shift[:4], margin_shift(R, o, g, scope=scope, mode=mode, direction="spread", delta=0.4))
    keep = margin_mask(*more, scope=scope, mode=mode, delta=0.4, retain=0.25)
    assert keep[4:].all()
    assert torch.equal(keep[:4], margin_mask(R, o, g, scope=scope, mode=mode, delta=0.4, retain=0.25))


@pytest.mark.parametrize("outcome", [[1, 1, 1, 1], [0, 0, 0, 0], [NAN] * 4, [1, NAN, 1, NAN]])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mode", MODES)
def test_without_both_outcomes_nothing_happens(outcome, scope, mode):
    o = torch.tensor(outcome, dtype=torch.float32)
    assert margin_shift(WORKED[0], o, WORKED[2], scope=scope, mode=mode, direction="lift", delta=0.4).eq(0).all()
    assert margin_mask(WORKED[0], o, WORKED[2], scope=scope, mode=mode, delta=0.4, retain=0.25).all()
    assert len(margins(WORKED[0], o, WORKED[2], scope=scope, mode=mode)) == 0


@pytest.mark.parametrize("scope", SCOPES)
def test_an_empty_batch_is_fine(scope):
    empty = torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert margin_shift(*empty, scope=scope, mode="mean", direction="lift", delta=0.4).shape == (0,)
    assert margin_mask(*empty, scope=scope, mode="mean", delta=0.4, retain=0.25).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"returns": torch.tensor([0.0, NAN, 0, 0])}, r"returns\[1\] is nan"),
        ({"returns": torch.tensor([0.0, 0, 0, float("-inf")])}, r"returns\[3\] is -inf"),
        ({"outcome": torch.tensor([1.0, 0, 1.5, 0])}, r"outcome\[2\] is 1.5"),
        ({"outcome": torch.tensor([1.0, 0, 0, -0.5])}, r"outcome\[3\] is -0.5"),
        ({"outcome": torch.tensor([1.0, float("inf"), 0, 0])}, r"outcome\[1\] is inf"),
        ({"outcome": torch.tensor([1.0, 0])}, "one length"),
        ({"threshold": NAN}, "threshold is nan: expected an outcome, 0 to 1"),
        ({"threshold": 1.5}, "threshold is 1.5"),
        ({"delta": -0.1}, "delta is -0.1"),
        ({"delta": NAN}, "delta is nan"),
        ({"delta": float("inf")}, "delta is infinite"),
        ({"scope": "batch"}, "scope is 'batch': expected one of group, global"),
        ({"mode": "median"}, "mode is 'median'"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "returns": WORKED[0],
        "outcome": WORKED[1],
        "group": WORKED[2],
        "scope": "group",
        "mode": "mean",
        "delta": 0.4,
    }
    with pytest.raises(ValueError, match=message):
        unchecked(margin_shift)(**(good | change), direction="lift")
    with pytest.raises(ValueError, match=message):
        unchecked(margin_mask)(**(good | change), retain=0.25)


def test_a_bad_direction_or_retain_is_named():
    with pytest.raises(ValueError, match="direction is 'up'"):
        unchecked(margin_shift)(*WORKED, scope="group", mode="mean", direction="up", delta=0.4)
    for retain in (1.5, -0.1, NAN):
        with pytest.raises(ValueError, match=f"retain is {retain}"):
            margin_mask(*WORKED, scope="group", mode="mean", delta=0.4, retain=retain)


@st.composite
def batches(draw, unit=32):
    """Draw responses of a few groups in any order. Returns are distinct, either in 32nds of a nat (so sums and ties are
    exact) or in other units.
    """
    group = draw(st.lists(st.sampled_from([-3, 0, 5, 10**12]), min_size=1, max_size=24))
    n = len(group)
    returns = draw(st.lists(st.integers(-200, 200), min_size=n, max_size=n, unique=True))
    outcome = draw(st.lists(st.sampled_from([0.0, 1.0, 0.3, 0.7, NAN]), min_size=n, max_size=n))
    return tensors([r / unit for r in returns], outcome, group, draw(st.sampled_from([torch.float32, torch.float64])))


def whose(outcome, group, scope):
    """Return the index lists (right, wrong) of each group."""
    ids = group if scope == "group" else torch.zeros_like(group)
    return [
        ((ids.eq(i) & (outcome >= 0.5)).nonzero()[:, 0], (ids.eq(i) & (outcome < 0.5)).nonzero()[:, 0])
        for i in ids.unique()
    ]


def margin_of(returns, right, wrong, mode):
    r, w = returns[right].double(), returns[wrong].double()
    return float(r.mean() - w.mean() if mode == "mean" else r.min() - w.max())


scope, mode, direction = st.sampled_from(SCOPES), st.sampled_from(MODES), st.sampled_from(DIRECTIONS)
deltas = st.integers(0, 128).map(lambda n: n / 32)


@many
@given(batches(), scope, mode, direction, deltas)
def test_after_a_shift_every_margin_is_delta_or_was_at_least_that(batch, scope, mode, direction, delta):
    R, o, g = batch
    after = R + margin_shift(R, o, g, scope=scope, mode=mode, direction=direction, delta=delta)
    for right, wrong in whose(o, g, scope):
        if len(right) and len(wrong):
            old = margin_of(R, right, wrong, mode)
            assert margin_of(after, right, wrong, mode) == pytest.approx(max(old, delta), abs=1e-5)
            if old >= delta:
                assert torch.equal(after[right], R[right])
                assert torch.equal(after[wrong], R[wrong])
        else:
            assert torch.equal(after[right], R[right])
            assert torch.equal(after[wrong], R[wrong])


@many
@given(batches(), scope, mode, direction, deltas)
def test_a_shift_is_one_constant_per_side_in_the_promised_direction(batch, scope, mode, direction, delta):
    R, o, g = batch
    shift = margin_shift(R, o, g, scope=scope, mode=mode, direction=direction, delta=delta)
    for right, wrong in whose(o, g, scope):
        ups, downs = set(shift[right].tolist()), set(shift[wrong].tolist())
        assert len(ups) <= 1  # so the order within the side stays
        assert len(downs) <= 1
        up, down = max(ups, default=0.0), max(downs, default=0.0)
        assert up >= 0 >= down
        assert {"lift": down == 0, "suppress": up == 0, "spread": not (ups and downs) or up == -down}[direction]


def greedy(returns, outcome, group, *, scope, mode, delta, retain):
    """Run Algorithm 1 literally, one drop at a time."""
    keep = torch.ones(len(returns), dtype=torch.bool)
    for right, wrong in whose(outcome, group, scope):
        pos = sorted(right.tolist(), key=lambda i: returns[i].item())
        neg = sorted(wrong.tolist(), key=lambda i: -returns[i].item())
        floors = [max(1, int(len(side) * retain)) for side in (pos, neg)]
        while pos and neg and (now := margin_of(returns, pos, neg, mode)) < delta - 1e-9:
            gain_pos = margin_of(returns, pos[1:], neg, mode) - now if len(pos) > floors[0] else 0.0
            gain_neg = margin_of(returns, pos, neg[1:], mode) - now if len(neg) > floors[1] else 0.0
            if max(gain_pos, gain_neg) <= 1e-9:
                break
            keep[(pos if gain_pos >= gain_neg - 1e-9 else neg).pop(0)] = False
    return keep


@settings(max_examples=250, deadline=None)
@given(batches(), scope, mode, deltas, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_mask_is_the_greedy_algorithm(batch, scope, mode, delta, retain):
    how = {"scope": scope, "mode": mode, "delta": delta, "retain": retain}
    assert torch.equal(margin_mask(*batch, **how), greedy(*batch, **how))


@many
@given(batches(), scope, mode, deltas, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_mask_never_goes_under_its_floor_and_never_lowers_a_margin(batch, scope, mode, delta, retain):
    R, o, g = batch
    keep = margin_mask(R, o, g, scope=scope, mode=mode, delta=delta, retain=retain)
    for right, wrong in whose(o, g, scope):
        for side in (right, wrong):
            assert keep[side].sum() >= min(len(side), max(1, int(len(side) * retain)))
        if len(right) and len(wrong):
            after = margin_of(R, right[keep[right]], wrong[keep[wrong]], mode)
            assert after >= margin_of(R, right, wrong, mode) - 1e-9
        else:
            assert keep[right].all()
            assert keep[wrong].all()


@many
@given(batches(unit=30), scope, mode, deltas, st.randoms())
def test_permuting_responses_permutes_the_result_to_the_bit(batch, scope, mode, delta, random):
    order = torch.tensor(random.sample(range(len(batch[0])), len(batch[0])))
    moved = [x[order] for x in batch]
    how = {"scope": scope, "mode": mode, "delta": delta}
    assert torch.equal(
        margin_shift(*batch, direction="spread", **how)[order], margin_shift(*moved, direction="spread", **how)
    )
    assert torch.equal(margin_mask(*batch, retain=0.25, **how)[order], margin_mask(*moved, retain=0.25, **how))


@many
@given(batches(unit=30), mode, deltas)
def test_sharding_groups_over_ranks_changes_no_bit(batch, mode, delta):
    how = {"scope": "group", "mode": mode, "delta": delta}
    shift, keep = margin_shift(*batch, direction="spread", **how), margin_mask(*batch, retain=0.25, **how)
    for rank in (0, 1):
        mine = batch[2] % 2 == rank
        share = [x[mine] for x in batch]
        assert torch.equal(shift[mine], margin_shift(*share, direction="spread", **how))
        assert torch.equal(keep[mine], margin_mask(*share, retain=0.25, **how))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("mode", MODES)
def test_64_groups_of_16_take_milliseconds(scope, mode):
    # Compare the best of many runs with the limit, so that a busy machine does not fail the test.
    rng = torch.Generator().manual_seed(0)
    o = (torch.rand(1024, generator=rng) < 0.5).float()
    R, g = torch.randn(1024, generator=rng) - 0.5 * o, torch.arange(1024) // 16
    for call in (
        lambda: unchecked(margin_shift)(R, o, g, scope=scope, mode=mode, direction="spread", delta=0.4),
        lambda: unchecked(margin_mask)(R, o, g, scope=scope, mode=mode, delta=0.4, retain=0.25),
    ):
        assert best_of(call, 30) < 5e-3


def best_of(call, times):
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
