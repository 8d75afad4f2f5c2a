"""Online balancing: which responses are cut, how many, and that the draw does not depend on their places."""

import itertools
import time

import pytest
import torch
from annotations import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

from mmopd.algorithm import balance_online

NAN, INF = float("nan"), float("inf")
many = settings(max_examples=100, deadline=None)


def balance(outcome, group, *, scope="group", ratio=1.0, tolerance=0.05, seed=0, function=balance_online, **more):
    return function(
        torch.as_tensor(outcome, dtype=torch.float32),
        torch.as_tensor(group),
        scope=scope,
        ratio=ratio,
        tolerance=tolerance,
        seed=seed,
        **more,
    )


def kept(keep, outcome):
    """Return the numbers of kept responses as (right, wrong)."""
    o = torch.as_tensor(outcome, dtype=torch.float32)
    return int(keep[o >= 0.5].sum()), int(keep[o < 0.5].sum())


@pytest.mark.parametrize(
    ("right", "wrong", "ratio", "expected"),
    [
        (5, 3, 1.0, (3, 3)),
        (3, 5, 1.0, (3, 3)),
        (4, 4, 1.0, (4, 4)),
        (16, 3, 2.0, (6, 3)),
        (2, 6, 0.5, (2, 4)),
        (5, 3, 0.5, (2, 3)),  # 1.5, rounded to the nearest whole number
        (3, 2, 2.0, (3, 2)),  # 3 : 1.5 rounds likewise: nothing to gain
        (7, 1, 0.1, (1, 1)),  # never cut to none
        (1, 7, 10.0, (1, 1)),
        (5, 3, 0.0, (0, 3)),  # two ratios keep one side alone
        (5, 3, INF, (5, 0)),
        (5, 0, 1.0, (5, 0)),  # one outcome: all kept, at any ratio
        (0, 5, 1.0, (0, 5)),
        (5, 0, 0.0, (5, 0)),
        (0, 5, INF, (0, 5)),
    ],
)
def test_a_group_is_cut_to_the_ratio(right, wrong, ratio, expected):
    outcome = [1] * right + [0] * wrong
    assert kept(balance(outcome, [4] * len(outcome), ratio=ratio), outcome) == expected


def test_each_group_is_cut_for_itself():
    outcome, group = [1, 1, 1, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    keep = balance(outcome, group)
    assert [kept(keep[i:j], outcome[i:j]) for i, j in ((0, 4), (4, 8), (8, 10))] == [(1, 1), (1, 1), (2, 0)]


@pytest.mark.parametrize(
    ("right", "wrong", "ratio", "tolerance", "expected"),
    [
        (80, 20, 1.0, 0.05, (24, 20)),  # 24/44 = 0.545: the first inside 0.45..0.55
        (20, 80, 1.0, 0.05, (20, 24)),
        (55, 45, 1.0, 0.05, (55, 45)),  # on the edge: inside
        (56, 44, 1.0, 0.05, (53, 44)),
        (60, 40, 3.0, 0.05, (60, 25)),  # rho = 0.75: 60/85 = 0.706
        (9, 1, 1.0, 0.0, (1, 1)),
        (1, 2, 1.5, 0.05, (1, 1)),  # no count gives 0.6: 1/2 is nearer than 1/3
        (3, 5, 0.0, 0.0, (0, 5)),
        (3, 5, INF, 0.0, (3, 0)),
        (3, 5, INF, 0.25, (3, 1)),
        (7, 0, 1.0, 0.05, (7, 0)),  # nothing to balance against
        (0, 7, 1.0, 0.05, (0, 7)),
    ],
)
def test_a_batch_is_cut_until_its_share_is_inside_the_interval(right, wrong, ratio, tolerance, expected):
    outcome = [1] * right + [0] * wrong
    group = [i % 5 for i in range(len(outcome))]
    assert kept(balance(outcome, group, scope="batch", ratio=ratio, tolerance=tolerance), outcome) == expected


def test_a_batch_is_cut_in_proportion_in_every_group():
    # 12, 8, 4 and 0 right responses, 8 wrong: keep 9 or 10 of 24; 9/17 = 0.529, at most 9.78, so 9 stay, 15/24 go.
    sizes = [12, 8, 4, 0]
    outcome = [1] * 24 + [0] * 8
    group = [g for g, n in enumerate(sizes) for _ in range(n)] + [3] * 8
    for seed in range(20):
        keep = balance(outcome, group, scope="batch", seed=seed)
        gone = [int((~keep[torch.tensor(group) == g]).sum()) for g in range(4)]
        assert sum(gone) == 15
        assert all(abs(n - 15 / 24 * size) <= 1 for n, size in zip(gone, sizes, strict=True))


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_every_response_is_equally_likely_to_stay(scope):
    outcome, group = [1] * 6 + [0] * 2, [3] * 8
    stays = sum(balance(outcome, group, scope=scope, seed=seed, tolerance=0.0).long() for seed in range(1000))
    assert stays[6:].eq(1000).all()
    # 2 of 6 stay, so 333 for each with a deviation of 15; allow five deviations.
    assert (stays[:6] - 333).abs().max() < 75


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_unknown_outcomes_stay_and_count_nowhere(scope):
    outcome, group = [1, 1, 1, 0], [0, 0, 0, 0]
    keys = torch.arange(4)
    keep = balance(outcome, group, scope=scope, key=keys)
    more = balance([*outcome, NAN, NAN], [*group, 0, 1], scope=scope, key=torch.arange(6))
    assert more[4:].all()
    assert torch.equal(more[:4], keep)
    assert balance([NAN] * 4, group, scope=scope).all()


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_an_empty_batch_is_fine(scope):
    assert balance([], torch.zeros(0, dtype=torch.long), scope=scope).shape == (0,)


def test_the_draw_is_of_the_seed():
    outcome, group = [1] * 12 + [0] * 4, [0] * 16
    draws = [balance(outcome, group, seed=seed) for seed in (1, 1, 2, -1, 2**70)]
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(d.tolist()) for d in draws}) == 4


def test_groups_draw_independently():
    outcome, group = [1] * 15 + [0], [0] * 16
    draws = {tuple(balance(outcome, [g] * 16, seed=0).tolist()) for g in range(100)}
    assert len(draws) == 15
    assert balance(outcome, group).sum() == 2


def test_soft_outcomes_are_cut_at_the_threshold():
    outcome, group = [0.9, 0.8, 0.6, 0.2], [0] * 4
    assert kept(balance(outcome, group), outcome) == (1, 1)
    assert balance(outcome, group, threshold=0.7).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": -1.0}, r"ratio is -1\.0"),
        ({"ratio": NAN}, "ratio is nan"),
        ({"ratio": -INF}, "ratio is -inf"),
        ({"tolerance": -0.1}, "tolerance is -0.1"),
        ({"tolerance": NAN}, "tolerance is nan"),
        ({"threshold": -0.1}, "threshold is -0.1: expected an outcome, 0 to 1"),
        ({"outcome": [1, INF, 0]}, r"outcome\[1\] is inf"),
        ({"tolerance": 1.1}, "tolerance is 1.1"),
        ({"scope": "global"}, "scope is 'global': expected one of group, batch"),
        ({"outcome": [1, 2, 0]}, r"outcome\[1\] is 2"),
        ({"group": [0, 0]}, "one length"),
        ({"key": torch.tensor([5, 6, 5])}, "key 5 is in group 0 more than once"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        balance(**({"outcome": [1, 1, 0], "group": [0, 0, 0]} | change), function=unchecked(balance_online))


@st.composite
def batches(draw):
    """Draw (outcome, group, key) of responses in any order, each with its own number in its group."""
    group = draw(st.lists(st.sampled_from([-3, 0, 5, 10**12]), min_size=1, max_size=40))
    outcome = draw(st.lists(st.sampled_from([0.0, 1.0, 1.0, 0.3, NAN]), min_size=len(group), max_size=len(group)))
    key = draw(st.permutations(range(len(group))))
    return torch.tensor(outcome), torch.tensor(group), torch.tensor(key)


scope = st.sampled_from(["group", "batch"])
ratio = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.7, 4.0, INF])
seed = st.integers(0, 2**31)


@many
@given(batches(), scope, ratio, seed, st.randoms())
def test_permuting_responses_permutes_the_result(batch, scope, ratio, seed, random):
    outcome, group, key = batch
    order = torch.tensor(random.sample(range(len(group)), len(group)))
    how = {"scope": scope, "ratio": ratio, "seed": seed}
    keep = balance(outcome, group, key=key, **how)
    assert torch.equal(keep[order], balance(outcome[order], group[order], key=key[order], **how))


@many
@given(batches(), scope, ratio, seed, st.randoms())
def test_without_keys_moving_whole_groups_moves_the_result_and_any_order_keeps_the_counts(
    batch, scope, ratio, seed, random
):
    outcome, group, _ = batch
    how = {"scope": scope, "ratio": ratio, "seed": seed}
    keep = balance(outcome, group, **how)
    by_group = group.argsort(stable=True)  # groups move, the order in a group stays
    assert torch.equal(keep[by_group], balance(outcome[by_group], group[by_group], **how))
    order = torch.tensor(random.sample(range(len(group)), len(group)))
    moved = balance(outcome[order], group[order], **how)
    for g in group.unique():
        assert kept(keep[group == g], outcome[group == g]) == kept(
            moved[group[order] == g], outcome[order][group[order] == g]
        )


@many
@given(batches(), ratio, seed)
def test_sharding_groups_over_ranks_changes_nothing(batch, ratio, seed):
    outcome, group, key = batch
    keep = balance(outcome, group, key=key, ratio=ratio, seed=seed)
    for rank in (0, 1):
        mine = group % 2 == rank
        assert torch.equal(keep[mine], balance(outcome[mine], group[mine], key=key[mine], ratio=ratio, seed=seed))


@many
@given(batches(), ratio, seed)
def test_scope_group_cuts_one_side_only_to_the_nearest_number(batch, ratio, seed):
    outcome, group, _ = batch
    keep = balance(outcome, group, ratio=ratio, seed=seed)
    assert keep[outcome.isnan()].all()
    for g in group.unique():
        o, k = outcome[group == g], keep[group == g]
        (right, wrong), before = kept(k, o), kept(torch.ones_like(k), o)
        if 0 in before:
            assert (right, wrong) == before
        elif ratio in (0.0, INF):
            assert (right, wrong) == ((0, before[1]) if ratio == 0 else (before[0], 0))
        else:
            assert right == before[0] or wrong == before[1]
            assert right in (before[0], max(1, int(ratio * wrong + 0.5)))
            assert wrong in (before[1], max(1, int(right / ratio + 0.5)))


@many
@given(batches(), ratio, st.sampled_from([0.0, 0.02, 0.05, 0.2]), seed)
def test_scope_batch_lands_inside_the_interval_or_as_near_as_it_can(batch, ratio, tolerance, seed):
    outcome, group, _ = batch
    right, wrong = kept(torch.ones_like(outcome, dtype=torch.bool), outcome)
    now = kept(balance(outcome, group, scope="batch", ratio=ratio, tolerance=tolerance, seed=seed), outcome)
    rho = 1.0 if ratio == INF else ratio / (1 + ratio)

    def distance(r, w):
        return max(0.0, abs(r / (r + w) - rho) - tolerance)

    if not right or not wrong:
        assert now == (right, wrong)
        return
    reachable = [
        (r, w) for r, w in itertools.product(range(right + 1), range(wrong + 1)) if r + w and (r == right or w == wrong)
    ]
    best = min(distance(r, w) for r, w in reachable)
    assert distance(*now) == pytest.approx(best, abs=1e-9)
    fewest = min(right + wrong - r - w for r, w in reachable if distance(r, w) <= best + 1e-9)
    assert right + wrong - sum(now) == fewest


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_64_groups_of_16_take_milliseconds(scope):
    outcome = (torch.rand(1024, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    group = torch.arange(1024) // 16
    seconds = []
    for seed in range(30):
        start = time.perf_counter()
        balance(outcome, group, scope=scope, seed=seed, function=unchecked(balance_online))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 5e-3
