"""The objectives other than OPD: what each gives the trainer, by hand and against the plain computation; what is
refused; and a run of each.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mmopd.algorithm import Tokens, forward_kl, grpo, jsd, likelihood_loss, opd, sft
from mmopd.algorithm.objectives import ExOPD
from mmopd.algorithm.settings import Algorithm
from mmopd.catalog import load_fleet, load_recipe
from mmopd.commands.compare import Run, run_all
from mmopd.config import Comparison, Fleet, Recipe, Route, Teacher
from mmopd.errors import UserError
from mmopd.runtime.progress import Stages
from mmopd.settings_file import build
from mmopd.teacher.router import references
from mmopd.train.logprob import LogprobHead

NAN = float("nan")
OFF = {"difficulty": None, "balance": None, "margin": None, "visual": None}


# ExOPD


def test_exopd_is_the_reward_of_the_paper_and_keeps_the_kl_to_the_teacher():
    teacher, student, reference = (
        torch.tensor(x) for x in ([-1.0, -2.0, -0.5], [-1.5, -1.0, -0.5], [-2.0, -3.0, -0.25])
    )
    arrays = {"outcome": torch.tensor([1.0, 0.0]), "group": torch.tensor([0, 0]), "weight": torch.ones(2)}
    common = {"settings": Algorithm(balance=None, margin=None), "seed": 0, **arrays}
    response = torch.tensor([0, 0, 1])
    out = opd(teacher, student, response, **common, reference=reference, scale=1.25)
    wanted = 1.25 * (teacher - reference) - (student - reference)
    assert out.advantage.tolist() == pytest.approx(wanted.tolist())
    plain = opd(teacher, student, response, **common)
    assert out.diagnostics["reverse_kl"] == plain.diagnostics["reverse_kl"]
    assert torch.equal(out.token_weight, plain.token_weight)
    assert torch.equal(
        opd(teacher, student, response, **common, reference=reference, scale=1.0).advantage, plain.advantage
    )
    with pytest.raises(ValueError, match=r"reference log-prob of token 1 \(response 0\) is nan"):
        opd(teacher, student, response, **common, reference=torch.tensor([0.0, NAN, 0.0]), scale=1.25)


def test_exopd_leaves_out_tokens_by_the_teacher_and_not_by_the_reference():
    out = opd(
        torch.tensor([-1.0, -12.0]),
        torch.tensor([-1.0, -1.0]),
        torch.tensor([0, 0]),
        outcome=torch.tensor([1.0]),
        group=torch.tensor([0]),
        weight=torch.ones(1),
        settings=Algorithm(balance=None, margin=None),
        seed=0,
        reference=torch.tensor([-90.0, -12.0]),
        scale=2.0,
    )
    assert out.token_weight.tolist() == [1.0, 0.0]
    assert out.advantage[0].item() == pytest.approx(89.0)


FLEET = Fleet(
    teachers={name: Teacher(model=Path(name)) for name in ("math", "code", "math_base", "start")},
    routes=(Route(task="math", teacher={"math": 3, "code": 1}), Route(task="*", teacher="code", view="text")),
)


def test_references_follow_the_routes_with_their_shares_and_views():
    one = references(FLEET, ExOPD(kind="exopd", reference="start"))
    assert list(one.teachers) == ["start"]
    assert [route.teachers for route in one.routes] == [{"start": 1.0}] * 2
    assert one.routes[1].view == "text"
    each = references(FLEET, ExOPD(kind="exopd", reference={"math": "math_base", "code": "start"}))
    assert each.routes[0].teachers == {"math_base": 0.75, "start": 0.25}
    assert references(FLEET, Algorithm().objective) is None


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("strat", "no teacher 'strat'; did you mean 'start'"),
        ({"math": "math_base"}, "teacher 'code' has none; add `code: NAME`"),
    ],
)
def test_a_reference_that_is_not_there_is_named(reference, message):
    with pytest.raises(UserError, match=f"algorithm.objective.reference: .*{message}"):
        references(FLEET, ExOPD(kind="exopd", reference=reference))


# GRPO


def test_grpo_by_hand():
    # Group 0: 1, 0, 0 (mean 1/3, deviation 0.577); group 1: all right; group 2: a single response; group 3: soft
    # outcomes and an unknown one.
    outcome = torch.tensor([1.0, 0, 0, 1, 1, 1, 0.25, 0.75, NAN])
    group = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3])
    lengths = torch.tensor([2, 1, 1, 1, 1, 1, 1, 1, 4])
    response = torch.arange(9).repeat_interleave(lengths)
    out = grpo(response, outcome=outcome, group=group, threshold=0.5)
    std = math.sqrt(1 / 3)
    high, low, soft = (2 / 3) / std, (-1 / 3) / std, 0.25 / math.sqrt(0.125)
    assert out.advantage.tolist() == pytest.approx([high, high, low, low, 0, 0, 0, -soft, soft, 0, 0, 0, 0], rel=1e-4)
    assert out.token_weight.tolist() == pytest.approx([1 / 16, 1 / 16, *[1 / 8] * 7, 0, 0, 0, 0])
    assert out.keep.tolist() == [True] * 8 + [False]
    assert out.diagnostics["correct_share"] == pytest.approx(5 / 8)
    assert out.diagnostics["two_sided_groups_before"] == 2


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.3, 1.0, NAN])), min_size=1, max_size=24), st.randoms()
)
@settings(max_examples=60, deadline=None)
def test_grpo_does_not_depend_on_the_order_and_its_advantages_sum_to_nothing(pairs, rng):
    def one(pairs):
        group, outcome = torch.tensor([g for g, _ in pairs]), torch.tensor([o for _, o in pairs])
        return grpo(torch.arange(len(pairs)), outcome=outcome, group=group, threshold=0.5)

    order = list(range(len(pairs)))
    rng.shuffle(order)
    straight, shuffled = one(pairs), one([pairs[i] for i in order])
    assert torch.allclose(straight.advantage[order], shuffled.advantage, atol=1e-5)
    for g in {g for g, _ in pairs}:
        assert sum(a for a, (h, _) in zip(straight.advantage.tolist(), pairs, strict=True) if h == g) == pytest.approx(
            0, abs=1e-4
        )
    assert straight.advantage.isfinite().all()


def test_with_no_known_outcome_grpo_gives_nothing_to_learn():
    out = grpo(torch.tensor([0, 1]), outcome=torch.tensor([NAN, NAN]), group=torch.tensor([0, 0]), threshold=0.5)
    assert out.token_weight.tolist() == [0, 0]
    assert not out.keep.any()


# SFT and dense


def test_sft_is_the_mean_over_tokens_and_then_over_responses():
    out = sft(torch.tensor([0, 0, 1]), weight=torch.tensor([1.0, 2.0]))
    assert out.token_weight.tolist() == [0.25, 0.25, 1.0]
    logprob = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss = likelihood_loss(logprob, out.token_weight)
    assert loss.item() == pytest.approx(0.25 + 0.5 + 3)
    loss.backward()
    assert logprob.grad.tolist() == [-0.25, -0.25, -1.0]


def likeliest(teacher, student, K):
    """Return a server's likeliest tokens of distributions [M, V], and the student's log-probs of these tokens."""
    top, ids = teacher.topk(K, -1)
    return top, student.gather(-1, ids)


@given(st.integers(0, 10_000), st.integers(1, 11), st.floats(0.1, 4))
@settings(max_examples=60, deadline=None)
def test_divergences_of_the_likeliest_are_lower_bounds_and_exact_when_all_are_told(seed, K, width):
    torch.manual_seed(seed)
    teacher, student = (torch.log_softmax(width * torch.randn(5, 12, dtype=torch.float64), -1) for _ in range(2))
    p, q = teacher.exp(), student.exp()
    whole = (p * (teacher - student)).sum(-1)
    some = forward_kl(*likeliest(teacher, student, K))
    assert (some >= -1e-6).all()
    assert (some <= whole + 1e-5).all()
    assert torch.allclose(forward_kl(*likeliest(teacher, student, 12)), whole, atol=1e-4)
    for beta in (0.1, 0.5, 0.9):
        m = beta * p + (1 - beta) * q
        exact = beta * (p * (teacher - m.log())).sum(-1) + (1 - beta) * (q * (student - m.log())).sum(-1)
        bound = jsd(*likeliest(teacher, student, K), beta)
        assert (bound >= -1e-6).all()
        assert (bound <= exact + 1e-5).all()
        assert torch.allclose(jsd(*likeliest(teacher, student, 12), beta), exact, atol=1e-4)


def test_a_divergence_is_nothing_where_both_agree_and_pulls_the_student_to_the_teacher():
    torch.manual_seed(0)
    teacher = torch.log_softmax(torch.randn(3, 12), -1)
    for settings_ in ({"divergence": "forward_kl"}, {"divergence": "jsd"}):
        dense = Algorithm(objective={"kind": "dense", "top_k": 4, **settings_})
        logits = torch.zeros(3, 12, requires_grad=True)
        losses = []
        for _ in range(200):
            out = torch.log_softmax(logits, -1)
            none = torch.zeros(3)
            tokens = Tokens(none, none, none, torch.ones(3) / 3, likeliest(teacher, out, 4))
            loss = dense.objective.loss(tokens, dense)
            losses.append(loss.item())
            (grad,) = torch.autograd.grad(loss, logits)
            logits = (logits - 2 * grad).detach().requires_grad_()
        assert losses[-1] < 0.01 * losses[0]
        assert min(losses) > -1e-6


def test_the_heads_several_logprobs_are_those_of_the_whole_softmax_with_their_gradients():
    torch.manual_seed(0)
    head = LogprobHead(8, 50, bias=False)
    hidden = torch.randn(150, 8, requires_grad=True)
    ids, pull = torch.randint(0, 50, (150, 3)), torch.randn(150, 3)
    out = head(hidden, ids)
    plain = torch.log_softmax(torch.nn.functional.linear(hidden, head.weight), -1).gather(1, ids)
    assert torch.allclose(out, plain, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad((out * pull).sum(), (hidden, head.weight), retain_graph=True),
        torch.autograd.grad((plain * pull).sum(), (hidden, head.weight)),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-4)


# Settings


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            {"objective": {"kind": "grpo"}, "margin": {}},
            "`margin` has no meaning with .*kind: grpo.*: set algorithm.margin=null",
        ),
        ({"objective": {"kind": "sft"}, "balance": {}}, "`balance` has no meaning"),
        ({"objective": {"kind": "dense"}, "margin": {}}, "`margin` has no meaning"),
        ({"objective": {"kind": "dense", "divergence": "reverse_kl"}}, "other tokens, which are not known"),
        ({"objective": {"kind": "exopd"}}, "reference"),
        ({"objective": {"kind": "exopd", "reference": "x", "scale": 0.5}}, "scale"),
        ({"objective": {"kind": "ppo"}}, "ppo"),
        ({"objective": {"kind": "grpo", "scale": 2}}, "scale"),
    ],
)
def test_settings_that_contradict_the_objective_are_named(algorithm, message):
    data = {"student": {"model": "m"}, "fleet": "f", "mixture": "x", "algorithm": algorithm}
    with pytest.raises(UserError, match=message):
        build(Recipe, data, "r.yaml")


def test_what_an_objective_has_no_use_for_is_off_by_default_and_only_grpo_needs_no_fleet():
    data = {"student": {"model": "m"}, "mixture": "x", "algorithm": {"objective": {"kind": "grpo"}}}
    algorithm = build(Recipe, data, "r.yaml").algorithm
    assert (algorithm.balance, algorithm.margin, algorithm.visual) == (None, None, None)
    with pytest.raises(UserError, match="fleet: missing"):
        build(Recipe, {**data, "algorithm": {}}, "r.yaml")


# A run of each, with real servers


PLAIN = {"algorithm.balance": None, "algorithm.margin": None}
RUNS = {
    "exopd": {"fleet": "teachers/demo_reference.yaml", "algorithm.objective": {"kind": "exopd", "reference": "base"}},
    "grpo": {"algorithm.objective.kind": "grpo", "student.sync": "broadcast", **PLAIN},
    "dense": {"algorithm.objective": {"kind": "dense", "top_k": 8}, "algorithm.margin": None},
    "expo": {"algorithm.objective.kind": "expo", **PLAIN},
    "sft": {"algorithm.objective": {"kind": "sft", "attempts": 2}, **PLAIN},
}


EASY = """\"\"\"Judge by the length: teachers of twelve steps are right by chance, and SFT needs right answers.\"\"\"

from mmopd.task import RIGHT, WRONG, Task


def judge(response, answer):
    return WRONG if len(response) % 2 else RIGHT


task = Task(name="{name}", modality="{modality}", verify=judge)
"""


@pytest.fixture(scope="module")
def easy(workspace, tmp_path_factory):
    """Return the workspace with another verifier."""
    folder = tmp_path_factory.mktemp("easy")
    for path in workspace.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "modalities").mkdir()
    for name, modality in (("additions", "text"), ("digit_sum", "image")):
        (folder / "modalities" / f"{name}.py").write_text(EASY.format(name=name, modality=modality), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def runs(server, easy):
    """Run each kind, one after the other as `mmopd compare` does, and one of them twice, on servers that stay up."""
    small = {
        "suite": None,
        "algorithm.difficulty": None,
        "train.steps": 3,
        "train.ranks": 1,
        "rollout.prompts": 4,
        "rollout.group": 4,
    }
    comparison = Comparison(recipe=Path("recipes/small.yaml"), variants={}, tables={})
    made = {
        kind: Run(kind, 0, small | RUNS[kind.removesuffix(" again")], easy / "runs" / kind)
        for kind in [*RUNS, "dense again"]
    }
    with pytest.MonkeyPatch.context() as patch, Stages(Console(quiet=True)) as stages:
        patch.chdir(easy)
        run_all(comparison, list(made.values()), easy / "servers", stages)
    return {kind: run.folder for kind, run in made.items()}


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", RUNS)
def test_every_objective_runs_from_a_recipe(kind, runs, easy):
    run = runs[kind]
    assert (run / "export" / "model.safetensors").is_file()
    lines = metrics(run) if kind != "expo" else []
    assert len(lines) == (0 if kind == "expo" else 3)
    assert all(line["absent"] == 0 and math.isfinite(line["loss"]) for line in lines)
    if kind == "grpo":
        assert not any(
            key.startswith("scoring/failed") or line.get("scoring/requests") for line in lines for key in line
        )
    if kind == "exopd":
        assert all(line["scoring/requests"] > 0 for line in lines)
    if kind == "sft":
        assert lines[-1]["loss"] > 0
        assert len(list((easy / ".mmopd" / "demo" / "shards").glob("*/answers/*.jsonl"))) == 2
    if kind == "dense":
        assert all(line["loss"] > 0 for line in lines)


def test_servers_stay_up_between_runs_and_a_run_on_used_ones_is_that_on_fresh_ones(runs, easy):
    started = (easy / "servers" / "servers.log").read_text(encoding="utf-8").count("supervisor: ")
    assert started == 3  # for dense, expo and sft; with references; with another weight transport
    first, again = (metrics(runs[kind]) for kind in ("dense", "dense again"))
    assert [line["loss"] for line in first] == [line["loss"] for line in again]
    assert runs["dense"].joinpath("samples.jsonl").read_text(encoding="utf-8") == runs["dense again"].joinpath(
        "samples.jsonl"
    ).read_text(encoding="utf-8")


def test_the_shipped_fleet_with_a_reference_differs_from_the_demos_in_nothing_else():
    fleet, demo = load_fleet("teachers/demo_reference.yaml"), load_fleet(load_recipe("recipes/demo.yaml").fleet)
    assert fleet.routes == demo.routes
    assert {name: teacher for name, teacher in fleet.teachers.items() if name != "base"} == demo.teachers
