"""The targets of a step do not depend on how its responses lie on ranks: simulated ranks for any step, and two real
processes.
"""

import datetime
import math
import multiprocessing
import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from mmopd.algorithm.settings import Algorithm, Balance, Margin
from mmopd.records import Absent, Outcome, Response, Sample, Score
from mmopd.train.batch import build_batch
from mmopd.train.distributed import Ranks

SEED = 11
ALGORITHMS = [
    Algorithm(balance=balance, margin=margin)
    for balance in (None, Balance(scope="group"), Balance(scope="batch", ratio=0.5, tolerance=0.0))
    for margin in (
        None,
        Margin(scope="group", mode="mean", direction="spread"),
        Margin(scope="global", mode="minmax", direction="lift"),
        Margin(kind="mask", scope="group", mode="minmax"),
        Margin(kind="mask", scope="global", mode="mean", retain=0.5),
    )
]
WITHOUT_CHOICE = [a for a in ALGORITHMS if a.balance is None and (a.margin is None or a.margin.kind == "shift")]

Targets = dict[str, tuple[bool, list[float], list[float]]]


def make_sample(draw: random.Random, group: int, i: int) -> Sample:
    """Draw one of many kinds of sample: long, empty, unknown, unscored, with a token left out. `text` identifies it."""
    T = draw.choice((0, 1, 2, 7))
    student = [-draw.expovariate(2.0) for _ in range(T)]
    rewards = [draw.choice((12.0, draw.gauss(0, 1), draw.gauss(0, 1))) for _ in range(T)]
    response = Response(tuple(range(T)), tuple(student), f"{group}-{i}", "stop", (("step-0", T),))
    outcome = Outcome(draw.choice((0.0, 1.0, 1.0, 0.7, math.nan)))
    score = Score("t", tuple(s + r for s, r in zip(student, rewards, strict=True)), draw.choice((1.0, 0.3)))
    return Sample(group, response, outcome, draw.choice((score, score, score, Absent("t", "timeout"))))


def make_step(seed: int, groups: int, size: int) -> list[Sample]:
    """Draw the responses of a step in the order of their groups; at least one of them can be scored."""
    draw = random.Random(seed)
    first = Sample(0, Response((1,), (-1.0,), "first", "stop", (("step-0", 1),)), Outcome(1.0), Score("t", (-1.5,)))
    return [first, *(make_sample(draw, group, i) for group in range(groups) for i in range(size))]


def targets_of(samples: Sequence[Sample], algorithm: Algorithm) -> Targets:
    """Return (keep, advantages, weights) of each response by its text, with floats unrounded."""
    batch = build_batch(samples, algorithm, SEED)
    advantage, weight, keep = (
        batch.targets.advantage.tolist(),
        batch.targets.token_weight.tolist(),
        batch.targets.keep.tolist(),
    )
    return {
        s.response.text: (k, advantage[at], weight[at])
        for s, at, k in zip(batch.samples, batch.spans, keep, strict=True)
    }


def shares(samples: Sequence[Sample], size: int, draw: random.Random) -> list[list[Sample]]:
    """Deal whole groups to ranks, each in the order in which its responses finished there."""
    ranks: list[list[list[Sample]]] = [[] for _ in range(size)]
    groups = sorted({s.group for s in samples})
    for group in draw.sample(groups, len(groups)):
        draw.choice(ranks).append([s for s in samples if s.group == group])
    return [list(chain.from_iterable(rank)) for rank in ranks]


steps = st.builds(make_step, st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 8))


@settings(max_examples=100, deadline=None)
@given(steps, st.sampled_from(ALGORITHMS), st.integers(1, 3), st.randoms(use_true_random=False))
def test_whole_groups_on_any_ranks_in_any_order_have_the_same_targets_to_the_bit(
    samples: list[Sample], algorithm: Algorithm, size: int, draw: random.Random
) -> None:
    gathered = list(chain.from_iterable(shares(samples, size, draw)))
    assert targets_of(gathered, algorithm) == targets_of(samples, algorithm)


@settings(max_examples=50, deadline=None)
@given(steps, st.sampled_from(WITHOUT_CHOICE), st.randoms(use_true_random=False))
def test_where_nothing_is_chosen_the_responses_of_a_group_may_be_anywhere(
    samples: list[Sample], algorithm: Algorithm, draw: random.Random
) -> None:
    gathered = draw.sample(samples, len(samples))
    assert targets_of(gathered, algorithm) == targets_of(samples, algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS[1:], ids=lambda a: f"{a.balance}, {a.margin}")
def test_a_rank_that_looked_at_its_own_responses_alone_would_find_something_else(algorithm: Algorithm) -> None:
    samples = make_step(1, 6, 8)
    alone = targets_of([s for s in samples if s.group % 2 == 0], algorithm)
    together = targets_of(samples, algorithm)
    assert any(together[text] != target for text, target in alone.items())


def test_two_processes_find_what_one_finds_to_the_bit(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")  # two more imports of torch would take longer than the rest
    ranks = [forked.Process(target=run_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    samples = make_step(1, 6, 8)
    expected = [targets_of(samples, algorithm) for algorithm in ALGORITHMS]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == expected


def run_rank(rank: int, out: Path) -> None:
    """Run one of two ranks: gather the responses of both, and write the targets."""
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/store", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=30)
    )
    ranks = Ranks(rank, 2, torch.device("cpu"), dist.group.WORLD)
    mine = [s for s in make_step(1, 6, 8) if s.group % 2 == rank]
    gathered = list(chain.from_iterable(ranks.gather_objects(mine)))
    assert {s.group for s in gathered} == set(range(6))
    torch.save([targets_of(gathered, algorithm) for algorithm in ALGORITHMS], out / f"{rank}.pt")
    ranks.barrier()
    dist.destroy_process_group()
