"""The plan of prompts: exact weights, every row before any repeats, exact resume, well-defined effects of a change."""

import json
from collections import Counter

import numpy as np
import pytest

from mmopd.errors import UserError
from mmopd.prompts import PromptPlan, RowError, Rows

SIZES = {"geo": 3_000, "chart": 40_000, "doc": 700, "text": 100_000}
EARLY = {"geo": 0.5, "chart": 0.3, "doc": 0.15, "text": 0.05}
LATE = {"geo": 0.1, "chart": 0.3, "doc": 0.2, "text": 0.4}
SOURCES = {name: Rows(size, f"fingerprint of {name}") for name, size in SIZES.items()}


def furthest(rows: list[tuple[str, int]], weights: dict[str, float]) -> float:
    """Return the largest |count - share| of any source in any window of the rows."""
    total, worst = sum(weights.values()), 0.0
    for name, weight in weights.items():
        ahead = np.cumsum([0.0] + [(source == name) - weight / total for source, _ in rows])
        worst = max(worst, float(ahead.max() - ahead.min()))
    return worst


@pytest.mark.parametrize("seed", range(20))
def test_any_window_of_any_length_is_within_two_rows_of_its_weights(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"s{i}" for i in range(int(rng.integers(1, 12)))]
    weights = {name: float(weight) for name, weight in zip(names, rng.lognormal(0, 1.5, len(names)), strict=True)}
    plan = PromptPlan({name: Rows(50, "") for name in names}, weights, seed)
    assert furthest(plan.draw(5_000), weights) <= 2


def test_weights_that_change_at_every_step_are_kept_within_two_rows_of_each_step() -> None:
    plan = PromptPlan(SOURCES, EARLY, 0)
    for step in range(200):
        mix = step / 199
        weights = {name: (1 - mix) * EARLY[name] + mix * LATE[name] for name in SIZES}
        plan.reweight(weights)
        counts = Counter(source for source, _ in plan.draw(256))
        assert max(abs(counts[name] - 256 * weights[name]) for name in SIZES) <= 2


def test_a_source_that_comes_back_starts_level() -> None:
    plan = PromptPlan(SOURCES, EARLY, 0)
    plan.draw(1_000)
    plan.reweight({**EARLY, "geo": 0.0})
    assert "geo" not in {source for source, _ in plan.draw(1_000)}
    plan.reweight(EARLY)
    assert furthest(plan.draw(300), EARLY) <= 2


def test_every_row_comes_once_before_any_comes_again() -> None:
    plan = PromptPlan({"a": Rows(700, ""), "b": Rows(90, "")}, {"a": 1, "b": 2}, 3)
    rows = [row for source, row in plan.draw(5_000) if source == "a"]
    for epoch in range(2):
        assert sorted(rows[epoch * 700 : (epoch + 1) * 700]) == list(range(700))
    assert rows[:700] != rows[700:1400]


def test_a_row_comes_as_often_as_its_weight_says() -> None:
    weights = np.random.default_rng(0).choice([1.0, 1.7, 2.0, 4.0], size=500)
    plan = PromptPlan({"a": Rows(500, "", weights)}, {"a": 1}, 0)
    epochs = 40
    seen = np.zeros(500)
    while plan.epochs()["a"] < epochs:
        seen[plan.draw(1)[0][1]] += 1
        assert plan.epochs()["a"] <= epochs
    assert np.abs(seen - epochs * weights / weights.mean()).max() <= 1


def test_the_copies_of_a_row_are_spread_over_the_epoch() -> None:
    weights = [1.0] * 300 + [4.0] * 100
    plan = PromptPlan({"a": Rows(400, "", weights)}, {"a": 1}, 0)
    rows: list[int] = []
    while plan.epochs()["a"] < 1:
        rows += [row for _, row in plan.draw(1)]
    for row in range(300, 400):
        places = [i for i, r in enumerate(rows) if r == row]
        assert len(places) in (2, 3)  # 4 over a mean of 1.75
        assert min(np.diff(places)) > 400 / 3 / 2


def test_row_weights_that_are_alike_change_nothing() -> None:
    for weight in (0.1, 1 / 3, 1.0, 7.7):
        plain, weighted = (
            PromptPlan({"a": Rows(997, "")}, {"a": 1}, 5),
            PromptPlan({"a": Rows(997, "", [weight] * 997)}, {"a": 1}, 5),
        )
        assert plain.draw(3_000) == weighted.draw(3_000)


def test_a_row_of_weight_zero_never_comes() -> None:
    plan = PromptPlan({"a": Rows(3, "", [1.0, 0.0, 0.5])}, {"a": 1}, 0)
    assert Counter(row for _, row in plan.draw(3_000)) == Counter({0: 2000, 2: 1000})


@pytest.mark.parametrize("stop", [0, 1, 57, 60, 61, 119])
def test_resume_goes_on_exactly(stop: int) -> None:
    hard = {"doc": np.random.default_rng(1).uniform(1, 4, SIZES["doc"])}
    sources = {name: Rows(size, "", hard.get(name)) for name, size in SIZES.items()}

    def steps(plan: PromptPlan, start: int, end: int) -> list[list[tuple[str, int]]]:
        drawn = []
        for step in range(start, end):
            if step == 60:
                plan.reweight(LATE)
            drawn.append(plan.draw(256))
        return drawn

    whole = steps(PromptPlan(sources, EARLY, 7), 0, 120)
    half = PromptPlan(sources, EARLY, 7)
    before = steps(half, 0, stop)
    state = json.loads(json.dumps(half.state()))
    resumed = PromptPlan(sources, EARLY, 7)
    resumed.restore(state)
    assert before + steps(resumed, stop, 120) == whole
    assert len(json.dumps(state)) < 300 * len(SIZES)


def test_the_plan_is_a_function_of_its_seed_and_never_changes() -> None:
    plan = PromptPlan({"a": Rows(10, ""), "b": Rows(10, "", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])}, {"a": 2, "b": 1}, 0)
    assert (
        "".join(f"{source}{row} " for source, row in plan.draw(15)) == "a4 b7 a9 a7 b3 a0 a5 b6 a8 a1 b0 a3 a6 b5 a2 "
    )
    assert PromptPlan({"a": Rows(10, "")}, {"a": 1}, 0).draw(10) != PromptPlan({"a": Rows(10, "")}, {"a": 1}, 1).draw(
        10
    )


@pytest.mark.parametrize(
    ("sources", "seed", "message"),
    [
        ({"a": Rows(9, "y")}, 0, "source 'a': its content changed"),
        ({"a": Rows(9, "x", [2.0] + [1.0] * 8)}, 0, "source 'a': its difficulty weights changed"),
        ({"a": Rows(9, "x"), "b": Rows(9, "x")}, 0, r"\['b'\] was added or removed"),
        ({"b": Rows(9, "x")}, 0, r"\['a', 'b'\] was added or removed"),
        ({"a": Rows(9, "x")}, 1, "seed is 1, but the checkpoint's is 0"),
    ],
)
def test_a_resume_refuses_what_has_changed(sources: dict[str, Rows], seed: int, message: str) -> None:
    state = PromptPlan({"a": Rows(9, "x")}, {"a": 1}, 0).state()
    with pytest.raises(UserError, match=message):
        PromptPlan(sources, dict.fromkeys(sources, 1.0), seed).restore(state)


@pytest.mark.parametrize("stop", [0, 3, 50])
def test_sources_come_and_go_at_a_resume_only_by_name(stop: int) -> None:
    before = PromptPlan(SOURCES, EARLY, 0)
    before.draw(stop)
    state = json.loads(json.dumps(before.state()))
    others = {name: SOURCES[name] for name in ("geo", "chart", "text")} | {"new": Rows(50, "")}
    weights = {"geo": 0.5, "chart": 0.3, "text": 0.1, "new": 0.1}

    def plan() -> PromptPlan:
        return PromptPlan(others, weights, 0)

    with pytest.raises(UserError, match=r"\['doc', 'new'\] was added or removed"):
        plan().restore(state)
    with pytest.raises(UserError, match=r"\['doc'\] was added or removed"):
        plan().restore(state, ["new"])
    with pytest.raises(UserError, match=r"\['chart'\] was neither added nor removed"):
        plan().restore(state, ["new", "doc", "chart"])
    after = plan()
    after.restore(state, ["new", "doc"])
    rows = after.draw(1_000)
    assert furthest(rows, weights) <= 2
    uninterrupted = PromptPlan(SOURCES, EARLY, 0)
    taken = sum(source == "geo" for source, _ in uninterrupted.draw(stop))
    geo = [row for source, row in uninterrupted.draw(2_000) if source == "geo"]
    assert [row for source, row in rows if source == "geo"][:100] == geo[:100], taken
    assert len({row for source, row in rows if source == "new"}) == 50


def broken(source: str, row: int) -> tuple[str, int]:
    """Return a reader for which every third row of `geo` and every row of `doc` from 300 on is bad."""
    if source == "geo" and row % 3 == 0:
        raise RowError("bad image", f"row {row}")
    if source == "doc" and row >= 300:
        raise ValueError(f"row {row}")
    return source, row


def test_a_bad_row_is_replaced_from_its_source_and_counted() -> None:
    plan, plain = PromptPlan(SOURCES, EARLY, 0), PromptPlan(SOURCES, EARLY, 0)
    rows = plan.read(3_000, broken)
    assert [source for source, _ in rows] == [source for source, _ in plain.draw(3_000)]
    assert not [row for source, row in rows if (source == "geo" and row % 3 == 0) or (source == "doc" and row >= 300)]
    assert set(plan.replaced) == {("geo", "bad image"), ("doc", "unusable")}
    used = Counter(source for source, _ in rows)
    for source in ("geo", "doc"):
        drawn = sum(n for (name, _), n in plan.replaced.items() if name == source) + used[source]
        assert plan.epochs()[source] * SIZES[source] == pytest.approx(drawn)


def test_a_resume_goes_on_after_the_bad_rows() -> None:
    whole = PromptPlan(SOURCES, EARLY, 7)
    rows = whole.read(2_000, broken)
    half = PromptPlan(SOURCES, EARLY, 7)
    before = half.read(777, broken)
    resumed = PromptPlan(SOURCES, EARLY, 7)
    resumed.restore(json.loads(json.dumps(half.state())))
    assert before + resumed.read(2_000 - 777, broken) == rows
    assert resumed.replaced == whole.replaced
    assert resumed.state() == whole.state()


def test_each_good_row_still_comes_once_before_any_comes_again() -> None:
    plan = PromptPlan({"geo": Rows(300, "")}, {"geo": 1}, 0)
    rows = [row for _, row in plan.read(400, broken)]
    assert sorted(rows[:200]) == sorted(rows[200:]) == [row for row in range(300) if row % 3]


def test_a_source_that_is_broken_ends_the_run_and_says_why() -> None:
    def gone(source: str, row: int) -> int:
        if source == "doc":
            raise RowError("truncated", "doc.tar: the file ends inside the row")
        return row

    with pytest.raises(
        UserError, match=r"source 'doc': 100 consecutive rows cannot be used; the last one: doc\.tar: the file ends"
    ):
        PromptPlan(SOURCES, EARLY, 0).read(1_000, gone)
    with pytest.raises(UserError, match="source 'doc': 7 consecutive rows"):
        PromptPlan({"doc": Rows(7, "")}, {"doc": 1}, 0).read(1, gone)


def test_our_own_mistakes_are_no_bad_rows() -> None:
    def mistaken(source: str, row: int) -> int:
        raise TypeError("ours")

    with pytest.raises(TypeError):
        PromptPlan(SOURCES, EARLY, 0).read(1, mistaken)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1.0}, r"\['b'\] is in only one of them"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, r"\['c'\] is in only one of them"),
        ({"a": 1.0, "b": -1.0}, "source 'b': its weight is -1.0"),
        ({"a": 1.0, "b": float("nan")}, "source 'b': its weight is nan"),
        ({"a": 0.0, "b": 0.0}, "are all 0"),
    ],
)
def test_weights_that_are_none_are_refused(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptPlan({"a": Rows(9, ""), "b": Rows(9, "")}, weights, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Rows(0, ""), "'a' has no rows"),
        (Rows(2, "", [1.0]), "1 row weights for 2 rows"),
        (Rows(2, "", [0.0, 0.0]), "not all 0"),
        (Rows(2, "", [1.0, -1.0]), "0 or more"),
        (Rows(2, "", [1.0, float("inf")]), "finite"),
    ],
)
def test_rows_that_are_none_are_refused(rows: Rows, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptPlan({"a": rows}, {"a": 1}, 0)
