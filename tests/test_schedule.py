"""Weights over time: by step and by outcome, without a burst, and the same after a resume."""

import json
from collections import Counter

import numpy as np
import pytest

from mmopd.config import Mixture
from mmopd.prompts import PromptPlan, Rows
from mmopd.prompts.schedule import Schedule


def mixture(adapt: float = 0.0) -> Mixture:
    sources = {
        "easy": {"shards": "e", "task": "t", "weight": 2},
        "hard": {"shards": "h", "task": "t", "weight": 1, "schedule": {10: 1, 50: 3}},
        "late": {"shards": "l", "task": "t", "weight": 0, "schedule": {20: 0, 21: 1}},
    }
    return Mixture.model_validate({"sources": sources, "adapt": adapt})


RIGHT = {"easy": 0.98, "hard": 0.5, "late": 0.0}


def run(start: int, end: int, plan: PromptPlan, schedule: Schedule) -> list[list[tuple[str, int]]]:
    """Run steps of 128 prompts, whose outcomes are a function of step and source."""
    steps = []
    for step in range(start, end):
        plan.reweight(schedule.weights(step))
        steps.append(plan.draw(128))
        rng = np.random.default_rng(step)
        outcomes = [(source, float(rng.random() < RIGHT[source])) for source, _ in steps[-1]]
        schedule.observe([*outcomes, ("easy", float("nan"))])
    return steps


def plan() -> PromptPlan:
    return PromptPlan({name: Rows(500, name) for name in RIGHT}, {"easy": 2, "hard": 1, "late": 0}, 0)


def test_steps_are_composed_by_the_schedule_of_the_mixture() -> None:
    steps, schedule = run(0, 60, plan(), Schedule(mixture())), Schedule(mixture())
    for step, rows in enumerate(steps):
        weights = schedule.weights(step)
        counts = Counter(source for source, _ in rows)
        assert max(abs(counts[name] - 128 * weight / sum(weights.values())) for name, weight in weights.items()) <= 2
    assert schedule.weights(30) == {"easy": 2, "hard": 2, "late": 1}
    assert schedule.weights(1000) == {"easy": 2, "hard": 3, "late": 1}


def test_outcomes_turn_the_mixture_to_what_is_neither_easy_nor_hopeless() -> None:
    schedule = Schedule(mixture(adapt=0.8))
    assert schedule.weights(0) == Schedule(mixture()).weights(0)
    run(0, 100, plan(), schedule)
    weights = schedule.weights(100)
    assert weights["hard"] == pytest.approx(3, rel=0.05)
    assert weights["easy"] < 2 * 0.4
    assert weights["late"] == pytest.approx(0.2)
    indifferent = Schedule(mixture(adapt=0.0))
    run(0, 100, plan(), indifferent)
    assert indifferent.weights(100) == {"easy": 2, "hard": 3, "late": 1}


def test_unknown_outcomes_say_nothing() -> None:
    schedule = Schedule(mixture(adapt=0.8))
    schedule.observe([("easy", float("nan"))] * 5)
    assert schedule.state() == {}


@pytest.mark.parametrize("stop", [0, 1, 20, 21, 45])
def test_a_resume_goes_on_exactly(stop: int) -> None:
    whole = run(0, 60, plan(), Schedule(mixture(0.5)))
    before, schedule = plan(), Schedule(mixture(0.5))
    half = run(0, stop, before, schedule)
    state = json.loads(json.dumps({"plan": before.state(), "schedule": schedule.state()}))
    after, resumed = plan(), Schedule(mixture(0.5))
    after.restore(state["plan"])
    resumed.restore(state["schedule"])
    assert half + run(stop, 60, after, resumed) == whole
