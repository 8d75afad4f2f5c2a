"""Offline balancing: the shape of a histogram, and weights that flatten it without dropping a bin or going too far."""

import pytest
import torch
from annotations import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

from mmopd.algorithm import difficulty_shape, difficulty_weights, drop_easy_weights, frontier_weights

many = settings(max_examples=150, deadline=None)
U = [60, 8, 5, 4, 4, 4, 5, 8, 102]
MIRRORED_J = [5, 5, 6, 7, 8, 9, 12, 18, 130]


def prompts(histogram):
    """Return c of each prompt."""
    return torch.arange(len(histogram)).repeat_interleave(torch.tensor(histogram))


def bins_of(weights, correct, K):
    """Return (weight of each bin, weighted histogram); all prompts of a bin must have one weight."""
    per_bin = torch.zeros(K + 1, dtype=torch.float64)
    for c in correct.unique():
        values = weights[correct == c].unique()
        assert len(values) == 1
        per_bin[c] = values[0]
    return per_bin, torch.bincount(correct, weights=weights.double(), minlength=K + 1)


@pytest.mark.parametrize(
    ("histogram", "shape"),
    [
        (U, "u"),
        (MIRRORED_J, "mirrored_j"),
        (MIRRORED_J[::-1], "flat"),  # hard for the student: the paper does not change this shape
        ([20] * 9, "flat"),
        ([1, 4, 10, 20, 30, 20, 10, 4, 1], "flat"),
        ([0, 0, 0, 0, 0, 0, 0, 0, 50], "mirrored_j"),
        ([50, 0, 0, 0, 0, 0, 0, 0, 50], "u"),
        ([10, 90], "flat"),  # one attempt has no middle bin
        ([40, 5, 45], "u"),
        ([11, 10, 10, 10, 11], "flat"),
        (
            [10, 4, 4, 4, 4, 4, 4, 4, 100],
            "mirrored_j",
        ),  # the hard end is above the middle, but far from its share of 15
    ],
)
def test_shapes_are_detected(histogram, shape):
    assert difficulty_shape(prompts(histogram), len(histogram) - 1) == shape


def test_u_raises_the_middle_to_the_lower_end():
    c = prompts(U)
    per_bin, after = bins_of(difficulty_weights(c, 8, cap=100.0), c, 8)
    assert per_bin.tolist() == pytest.approx([1, 60 / 8, 60 / 5, 60 / 4, 60 / 4, 60 / 4, 60 / 5, 60 / 8, 1])
    assert after.tolist() == pytest.approx([60] * 8 + [102], rel=1e-6)


def test_mirrored_j_raises_all_but_the_always_right():
    c = prompts(MIRRORED_J)
    _, after = bins_of(difficulty_weights(c, 8, cap=100.0), c, 8)
    assert after.tolist() == pytest.approx([130] * 9, rel=1e-6)


def test_weights_are_capped():
    c = prompts(MIRRORED_J)
    per_bin, after = bins_of(difficulty_weights(c, 8, cap=4.0), c, 8)
    assert per_bin.tolist() == [4, 4, 4, 4, 4, 4, 4, 4, 1]
    assert after.tolist() == [20, 20, 24, 28, 32, 36, 48, 72, 130]


def test_a_forced_shape_is_taken():
    c = prompts(U)
    assert difficulty_weights(c, 8, shape="flat", cap=4.0).eq(1).all()
    per_bin, _ = bins_of(difficulty_weights(c, 8, shape="mirrored_j", cap=4.0), c, 8)
    assert per_bin.tolist() == pytest.approx([102 / 60, 4, 4, 4, 4, 4, 4, 4, 1])
    flat = prompts([20] * 9)
    assert difficulty_weights(flat, 8, shape="u", cap=4.0).eq(1).all()


def test_a_forced_u_without_ends_levels_the_middle():
    c = prompts([0, 10, 40, 0])
    per_bin, _ = bins_of(difficulty_weights(c, 3, shape="u", cap=4.0), c, 3)
    assert per_bin.tolist() == [0, 4, 1, 0]


def test_prompts_with_unjudged_answers_go_to_the_nearest_bin_and_the_ends_stay_pure():
    # K = 4. 3 of 3 is "always", 0 of 2 "never", 1 of 3 the bin of 1 of 4, 7 of 8 would be 4 of 4 but was wrong once.
    correct, attempts = torch.tensor([4, 4, 4, 3, 0, 1, 0]), torch.tensor([4, 4, 4, 3, 2, 3, 0])
    weights = difficulty_weights(correct, attempts, shape="mirrored_j", cap=10.0)
    assert weights.tolist() == [1, 1, 1, 1, 4, 4, 1]
    correct, attempts = torch.tensor([8, 8, 8, 8, 7]), torch.tensor([8, 8, 8, 8, 8])
    assert difficulty_weights(correct, attempts, shape="mirrored_j", cap=10.0).tolist() == [1, 1, 1, 1, 4]
    correct, attempts = torch.tensor([4, 4, 2, 99]), torch.tensor([4, 4, 4, 100])
    assert difficulty_weights(correct, attempts, shape="mirrored_j", cap=10.0).tolist() == [1, 1, 2, 2]


def test_no_prompts_or_none_judged_is_fine():
    none = torch.zeros(0, dtype=torch.long)
    assert difficulty_weights(none, 8, cap=4.0).shape == (0,)
    assert difficulty_shape(none, 8) == "flat"
    assert difficulty_weights(torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), cap=4.0).tolist() == [
        1,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("correct", "attempts", "more", "message"),
    [
        ([1, 9], 8, {}, r"correct\[1\] is 9 of 8 attempts"),
        ([-1, 2], 8, {}, r"correct\[0\] is -1"),
        ([1, 2], torch.tensor([4]), {}, "one length"),
        ([1, 2], 8, {"cap": 0.5}, r"cap is 0\.5"),
        ([1, 2], 8, {"cap": float("nan")}, "cap is nan"),
        ([1, 2], 8, {"shape": "j"}, "shape is 'j': expected one of auto, u, mirrored_j, flat"),
    ],
)
def test_bad_input_is_named(correct, attempts, more, message):
    with pytest.raises(ValueError, match=message):
        unchecked(difficulty_weights)(torch.tensor(correct), attempts, **({"cap": 4.0} | more))


def lorenz(histogram):
    """Return the shares of the poorest 1, 2, ... bins: a higher curve is flatter by any measure of inequality."""
    shares = histogram[histogram > 0].sort().values / histogram.sum()
    return shares.cumsum(0)


@many
@given(
    st.integers(1, 10).flatmap(lambda K: st.lists(st.integers(0, 40), min_size=K + 1, max_size=K + 1)).filter(any),
    st.sampled_from(["auto", "u", "mirrored_j", "flat"]),
    st.sampled_from([1.0, 1.5, 4.0, 1000.0]),
)
def test_weights_flatten_the_histogram_keep_every_prompt_and_stay_under_the_cap(histogram, shape, cap):
    c, K = prompts(histogram), len(histogram) - 1
    weights = difficulty_weights(c, K, shape=shape, cap=cap)
    assert weights.min() >= 1
    assert weights.max() <= cap
    _, after = bins_of(weights, c, K)
    assert (lorenz(after) >= lorenz(torch.tensor(histogram).double()) - 1e-6).all()


@many
@given(st.lists(st.integers(0, 8), min_size=1, max_size=60), st.randoms())
def test_permuting_prompts_permutes_the_weights(correct, random):
    c = torch.tensor(correct)
    order = torch.tensor(random.sample(range(len(c)), len(c)))
    assert torch.equal(difficulty_weights(c, 8, cap=4.0)[order], difficulty_weights(c[order], 8, cap=4.0))


def test_the_rules_of_others_drop_or_weigh_by_hand_worked_numbers():
    correct, attempts = torch.tensor([0, 1, 4, 8, 2, 0]), torch.tensor([8, 8, 8, 8, 4, 0])
    assert drop_easy_weights(correct, attempts).tolist() == [1, 1, 1, 0, 1, 1]
    assert frontier_weights(correct, attempts).tolist() == pytest.approx([0, 0.4375, 1, 0, 1, (0.4375 + 1 + 1) / 5])
    assert frontier_weights(torch.tensor([0]), torch.tensor([0])).tolist() == [1]
    assert drop_easy_weights(torch.tensor([2, 2]), torch.tensor([2, 8])).tolist() == [0, 1], (
        "all of two is always, two of eight is not"
    )
    for rule in (drop_easy_weights, frontier_weights):
        with pytest.raises(ValueError, match=r"correct\[1\] is 9 of 8"):
            rule(torch.tensor([1, 9]), 8)
