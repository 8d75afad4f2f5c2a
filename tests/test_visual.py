"""Visual advantage: the image's effect on each token, as a token weight, a metric and a row of the heatmap."""

import math
from pathlib import Path

import pytest
import torch
from annotations import unchecked
from hypothesis import given, settings
from hypothesis import strategies as st

from mmopd.algorithm import visual_weights
from mmopd.algorithm.settings import Algorithm, Visual
from mmopd.algorithm.visual import CAP
from mmopd.config import Recipe, Student
from mmopd.demo.world import build_processor
from mmopd.modality import Encoder
from mmopd.records import Absent, Encoded, Outcome, Prompt, Response, Sample, Score
from mmopd.report.metrics import documented, read_lines
from mmopd.runtime.run_folder import RunFolder
from mmopd.train.batch import build_batch, minibatches, visual_advantage
from mmopd.train.recorder import Recorder, visual

NAN = math.nan
PLAIN = Algorithm(balance=None, margin=None)
STRONG = Algorithm(balance=None, margin=None, visual=Visual(token_weight=2.0))


def test_weights_by_hand():
    weight = torch.tensor([0.1, 0.1, 0.2, 0.3, 0.3], dtype=torch.float64)
    advantage = torch.tensor([1.0, -5.0, 100.0, NAN, NAN], dtype=torch.float64)
    got = visual_weights(weight, advantage, torch.tensor([0, 0, 0, 1, 1]), strength=2.0, cap=1.5)
    raised = [0.1 * 3, 0.1 * 1, 0.2 * 4]  # gains 1 + 2 * 1, 1 + 2 * 0, 1 + 2 * 1.5
    assert got.tolist() == pytest.approx([r * 0.4 / 1.2 for r in raised] + [0.3, 0.3])


@st.composite
def steps(draw):
    """Draw (weight [M], advantage [M], response [M], responses that were scored without the image)."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    asked = draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    response = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    M = len(response)
    weight = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=M, max_size=M))
    value = draw(st.lists(st.floats(-40, 40), min_size=M, max_size=M))
    advantage = torch.tensor(value).masked_fill(~torch.tensor(asked)[response], NAN)
    return torch.tensor(weight), advantage, response, asked


def sums(weight, response, responses):
    return torch.bincount(response, weights=weight.double(), minlength=responses).tolist()


@settings(max_examples=200, deadline=None)
@given(steps(), st.floats(0.01, 50), st.floats(0.01, 10))
def test_a_response_weighs_what_it_weighed_and_its_tokens_are_ordered_by_what_the_image_does(step, strength, cap):
    weight, advantage, response, asked = step
    got = visual_weights(weight, advantage, response, strength=strength, cap=cap)
    assert got.dtype == weight.dtype
    assert (got >= 0).all()
    assert got[weight == 0].eq(0).all()
    assert sums(got, response, len(asked)) == pytest.approx(sums(weight, response, len(asked)), rel=1e-5)
    untouched = ~torch.tensor(asked)[response]
    assert torch.equal(got[untouched], weight[untouched])
    for n, scored in enumerate(asked):
        mine = (response == n) & (weight > 0)
        ratio, v = (got[mine] / weight[mine]).double(), advantage[mine]
        if scored and len(v):
            order = v.argsort()
            assert (ratio[order].diff() >= -1e-5 * ratio.max()).all(), (
                "a token that needs the image more weighs no less"
            )
            most = 1 + strength * cap
            assert ratio.max() <= most * (1 + 1e-5)
            assert ratio.min() >= (1 - 1e-5) / most
            if (v <= 0).all() or (v >= cap).all():
                assert ratio.tolist() == pytest.approx([1.0] * len(v), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(steps())
def test_strength_zero_is_exactly_nothing(step):
    weight, advantage, response, _ = step
    assert visual_weights(weight, advantage, response, strength=0.0) is weight


def test_bad_input_is_named():
    one, index = torch.ones(2), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="one length"):
        unchecked(visual_weights)(one, torch.ones(3), index, strength=1.0)
    for name in ("strength", "cap"):
        with pytest.raises(ValueError, match=f"{name} is -1"):
            visual_weights(one, one, index, **({"strength": 1.0, "cap": 1.0} | {name: -1.0}))
    assert visual_weights(one[:0], one[:0], index[:0], strength=1.0).shape == (0,)


def sample(group, seeing, blind=None, weight=1.0, student=None):
    """Return a right response to prompt `group`; `seeing` and `blind` are log-probs, or the cause of their absence."""

    def score(logprobs):
        return Absent("t", logprobs) if isinstance(logprobs, str) else Score("t", tuple(logprobs), weight)

    tokens = student or [-1.0] * (3 if isinstance(seeing, str) else len(seeing))
    response = Response(tuple(range(len(tokens))), tuple(tokens), "text", "stop", (("step-0", len(tokens)),))
    return Sample(group, response, Outcome(1.0), score(seeing), None if blind is None else score(blind))


def prompts(*tasks):
    return [Encoded(Prompt(f"p/{i}", task, "image", (), (), ""), (1,), (1,), ()) for i, task in enumerate(tasks)]


def test_the_weights_of_a_step_follow_the_image_only_where_it_was_asked_and_only_if_told_to():
    samples = [
        sample(0, [-0.5, -0.5, -0.5], [-0.5, -2.5, -0.5]),
        sample(0, [-0.5, -0.5]),
        sample(1, [-0.5, -0.5], "timeout"),
        sample(1, "timeout", [-0.5, -0.5, -0.5]),
        sample(1, [-0.5, -0.5, -20.0], [-0.5, -9.0, -0.1]),
    ]
    plain = build_batch(samples, PLAIN, 0).targets.token_weight
    off = build_batch(samples, PLAIN.model_copy(update={"visual": None}), 0).targets.token_weight
    strong = build_batch(samples, STRONG, 0)
    assert torch.equal(plain, off)
    assert plain.tolist() == pytest.approx([1 / 12] * 3 + [1 / 8] * 6 + [0.0])
    got = strong.targets.token_weight.tolist()
    assert got[:3] == pytest.approx([1 / 28, 5 / 28, 1 / 28])  # gains 1, 1 + 2 * 2, 1
    assert got[3:7] == pytest.approx([1 / 8] * 4)
    assert got[7:] == pytest.approx(
        [1 / 4 / (2 + 2 * CAP), (1 + 2 * CAP) / 4 / (2 + 2 * CAP), 0.0]
    )  # a clipped token is left out
    [[*items]] = minibatches(strong, prompts("a", "b"), 1)
    assert torch.cat([item.weight for item in items]).tolist() == pytest.approx(got)


def test_a_response_weighs_what_its_score_says():
    got = build_batch([sample(0, [-0.5, -0.5], weight=1.75), sample(1, [-0.5], weight=0.5)], PLAIN, 0)
    assert got.targets.token_weight.tolist() == pytest.approx([1.75 / 4, 1.75 / 4, 0.25])


def test_the_advantage_of_a_sample_needs_both_scores():
    assert visual_advantage(sample(0, [-0.5, -1.0], [-0.75, -0.5])) == pytest.approx([0.25, -0.5])
    assert visual_advantage(sample(0, [-0.5])) is None
    assert visual_advantage(sample(0, [-0.5], "view")) is None
    assert visual_advantage(sample(0, "view", [-0.5])) is None


def test_the_metric_is_a_mean_of_means_by_task_and_what_is_missing_is_counted():
    samples = [
        sample(0, [-1.0, -1.0], [-2.0, -4.0]),  # 2
        sample(0, [-1.0], [-1.5]),  # 0.5
        sample(1, [-1.0], [-0.5]),  # -0.5
        sample(1, [-1.0], "timeout"),
        sample(1, "ids", [-0.5]),
        sample(2, [-1.0]),
    ]
    got = visual(prompts("charts", "figures", "words"), samples)
    assert got == {
        "scored_blind": 3.0,
        "absent_blind": 2.0,
        "visual_advantage/charts": pytest.approx(1.25),
        "visual_advantage/figures": pytest.approx(-0.5),
    }
    assert all(documented(name) for name in got)
    assert visual(prompts("words"), [sample(0, [-1.0])]) == {}


def test_a_run_keeps_the_metric_and_shows_responses_that_were_scored_both_ways(tmp_path):
    build_processor().save_pretrained(tmp_path / "student")
    recipe = Recipe(student=Student(model=tmp_path / "student"), fleet=Path("f"), mixture=Path("m"), algorithm=PLAIN)
    samples = [sample(0, [-1.0, -1.0]), sample(0, [-1.0, -3.0], [-2.0, -1.5]), sample(1, [-1.0])]
    batch = build_batch(samples, PLAIN, 0)
    run = RunFolder(tmp_path / "run")
    run.create(recipe)
    with Recorder(run, PLAIN, Encoder(tmp_path / "student"), steps=recipe.train.steps, done=0) as recorder:
        recorder.step(0, prompts("charts", "words"), samples, batch, updates=[], more={"scoring/requests": 4.0})
    [metrics] = read_lines(run.metrics)
    assert metrics["visual_advantage/charts"] == pytest.approx(-0.25)
    assert (metrics["scored_blind"], metrics["absent_blind"], metrics["scoring/requests"]) == (1, 0, 4)
    assert [(r["task"], r["visual"]) for r in read_lines(run.samples)] == [("charts", [1.0, -1.5]), ("words", None)]
    assert read_lines(run.newest) == read_lines(run.samples)
