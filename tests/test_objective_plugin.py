"""An objective of the workspace: the file in docs/objectives.md is loaded, shown and trained with, unchanged.

`python test_objective_plugin.py MODEL RECIPE OUT`, with RANK etc. in the environment, is the training rank.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mmopd import catalog, settings_file
from mmopd.algorithm.objectives import OBJECTIVES
from mmopd.commands.show import show
from mmopd.config import Recipe
from mmopd.demo.world import additions
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.records import Outcome, Prompt, Response, Sample, Score
from mmopd.train.batch import build_batch, minibatches
from mmopd.train.distributed import free_port, start, stop
from mmopd.train.prefix_tree import Item
from mmopd.train.recorder import calibration
from mmopd.train.trainer import Trainer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
REST = "student: {model: m}\nfleet: teachers/demo.yaml\nmixture: data/demo.yaml\n"
PROMPTS, GROUP, STEPS = 3, 2, 3


def block(language: str) -> str:
    (text,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return text


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the reader's workspace, with the file and the recipe of the page."""
    for folder in ("algorithm", "recipes"):
        (tmp_path / folder).mkdir()
    assert "`algorithm/surprising.py`" in PAGE
    (tmp_path / "algorithm" / "surprising.py").write_text(block("python"), encoding="utf-8")
    (tmp_path / "recipes" / "mine.yaml").write_text(REST + block("yaml"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(objective: str) -> Recipe:
    return settings_file.build(Recipe, {"student": {"model": "m"}, "fleet": "f", "mixture": "x"}, "r", [objective])


def test_a_recipe_names_the_file_and_what_it_ignores_is_off(place):
    recipe = catalog.load_recipe("recipes/mine.yaml")
    assert type(recipe.algorithm.objective).__name__ == "Surprising"
    assert recipe.algorithm.objective.model_dump() == {"kind": "surprising", "share": 0.3}
    assert (recipe.algorithm.balance, recipe.algorithm.margin) == (None, None)
    assert recipe.algorithm.visual is not None
    with pytest.raises(UserError, match=r"`margin` has no meaning with `objective: \{kind: surprising\}`"):
        catalog.load_recipe("recipes/mine.yaml", overrides=["algorithm.margin.delta=1"])


def test_show_prints_it_and_what_is_written_reads_back(place):
    recipe = catalog.load_recipe("recipes/mine.yaml")
    console = Console(record=True, width=120, file=(place / "out").open("w", encoding="utf-8"))
    show(recipe, console)
    assert re.search(r"objective:\s+kind: surprising\s+share: 0.3", console.export_text())
    (place / "resolved.yaml").write_text(settings_file.dump(recipe), encoding="utf-8")
    assert settings_file.read(Recipe, place / "resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("{kind: surprise}", "algorithm.objective: .*no objective 'surprise'.*did you mean 'surprising'"),
        ("{kind: gpro}", "algorithm.objective: .*no objective 'gpro'.*did you mean 'grpo'"),
        ("{kind: ../surprising}", "no objective '../surprising'"),
        ("{kind: surprising, shrae: 1}", "`shrae` is no setting of `kind: surprising`; did you mean 'share'"),
        ("{kind: surprising, share: 2}", "algorithm.objective.share: has to be less than or equal to 1"),
        ("{share: 0.5}", "algorithm.objective: .*`kind` is missing; there is opd, exopd"),
        ("surprising", "expected keys and values, such as `objective: {kind: surprising}`"),
    ],
)
def test_a_mistake_in_the_recipe_is_named(place, objective, message):
    with pytest.raises(UserError, match=message):
        load(f"algorithm.objective={objective}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0\n", r"other\.py:1: ZeroDivisionError"),
        ("", r"other\.py: it defines 0 classes derived from mmopd.algorithm.Objective"),
        (
            "from mmopd.algorithm import Objective\nclass Other(Objective):\n    pass\n",
            r"other\.py: Other has no method `targets\(self, step\)`",
        ),
    ],
)
def test_a_file_that_is_no_objective_is_named(place, text, message):
    (place / "algorithm" / "other.py").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load("algorithm.objective={kind: other}")


def test_a_file_with_the_name_of_a_built_in_objective_is_refused(place):
    (place / "algorithm" / "grpo.py").write_text(block("python"), encoding="utf-8")
    with pytest.raises(UserError, match=r"grpo\.py: `grpo` is the name of a built-in objective"):
        load("algorithm.objective={kind: grpo}")


def test_three_steps_train_a_student_with_it(place, model):
    found = run_rank(place, model)
    assert len(found["losses"]) == STEPS
    assert found["losses"][-1] == pytest.approx(found["by_hand"], rel=1e-4)
    assert all(norm > 0 for norm in found["norms"])
    assert found["tokens"] == [found["chosen"]] * STEPS
    assert found["moved"] > 0
    assert 0.3 <= found["metrics"]["objective/chosen"] < 0.5
    assert found["metrics"]["kept"] > 0


def run_rank(place: Path, model: Path) -> dict[str, Any]:
    """Train in a separate process in the workspace, from the resolved recipe, as a rank does."""
    recipe = catalog.load_recipe("recipes/mine.yaml", overrides=[f"student.model={model}", *SMALL])
    (place / "resolved.yaml").write_text(settings_file.dump(recipe), encoding="utf-8")
    env = os.environ | {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    command = [sys.executable, __file__, str(model), "resolved.yaml", "out.json"]
    done = subprocess.run(
        command, cwd=place, env=env, capture_output=True, text=True, timeout=600, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "out.json").read_text(encoding="utf-8"))


SMALL = [
    "train.dtype=float32",
    "train.lr=0.001",
    "train.warmup=0",
    "train.gradient_checkpointing=false",
    f"train.steps={STEPS}",
]


def main(model: Path, resolved: Path, out: Path) -> None:
    """Train on the same responses in each step, with the student's log-probs from before the step."""
    torch.set_num_threads(1)
    recipe = settings_file.read(Recipe, resolved)
    encoder = Encoder(model)
    trainer = Trainer(model, encoder, recipe.train, recipe.algorithm, start(60))
    rows = additions("train", PROMPTS, 0)
    asked = [Prompt(f"s/{k}", "t", "text", tuple(row["messages"]), (), "") for k, row in enumerate(rows)]
    prompts = [encoder.encode(prompt) for prompt in asked]
    random = torch.Generator().manual_seed(0)
    groups = [group for group in range(PROMPTS) for _ in range(GROUP)]
    lengths = [3 + k for k in range(len(groups))]
    tokens = [tuple(torch.randint(5, 900, (T,), generator=random).tolist()) for T in lengths]
    items = [Item.to_score(prompts[group], ids) for group, ids in zip(groups, tokens, strict=True)]
    before = trainer.logprobs(items)
    scores = [Score("t", tuple((x + torch.randn(len(x), generator=random)).tolist())) for x in before]
    losses: list[float] = []
    norms: list[float] = []
    used: list[float] = []
    for step in range(STEPS):
        responses = [
            Response(ids, tuple(student.tolist()), "", "stop", ())
            for ids, student in zip(tokens, trainer.logprobs(items), strict=True)
        ]
        samples = [
            Sample(group, response, Outcome(1.0), score)
            for group, response, score in zip(groups, responses, scores, strict=True)
        ]
        batch = build_batch(samples, recipe.algorithm, step)
        (items_of_step,) = minibatches(batch, prompts, 1)
        stats = trainer.update(items_of_step)
        losses.append(stats["loss"])
        norms.append(stats["grad_norm"])
        used.append(stats["tokens"])
    moved = max(float((a - b).abs().max()) for a, b in zip(before, trainer.logprobs(items), strict=True))
    targets = batch.targets
    found = {
        "losses": losses,
        "norms": norms,
        "tokens": used,
        "by_hand": -float((targets.token_weight * targets.advantage).sum()),
        "chosen": float((targets.token_weight > 0).sum()),
        "moved": moved,
        "metrics": calibration(targets),
    }
    out.write_text(json.dumps(found), encoding="utf-8")
    stop()


def test_settings_of_all_objectives_are_read_without_torch():
    code = "import sys, mmopd.config; assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_no_other_file_asks_for_a_kind():
    asks = re.compile(
        r"(?<!\{)(?<!\"algorithm\.)objective\.kind|isinstance\([a-z_.]*objective|isinstance\(.*\b(SFT|OPD|ExOPD|GRPO|Dense|ExPO)\)"
        rf"|kind (==|!=|in) .*['\"]({'|'.join(OBJECTIVES)})['\"]|algorithm\.objectives"
    )
    files = [path for path in (ROOT / "mmopd").rglob("*.py") if "algorithm" not in path.relative_to(ROOT).parts]
    assert len(files) > 100
    found = [
        f"{path}:{n}: {line}"
        for path in files
        for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if asks.search(line)
    ]
    # The reference of settings lists every objective, and two commands take the name of a file; none asks for one.
    listing = re.compile(r"commands/(reference|new|show_file)\.py:\d+: *from mmopd\.algorithm\.objectives import ")
    assert [line for line in found if not listing.search(line)] == []


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
