"""`--json` of show, plan, doctor and eval: one JSON value on stdout, and the exit status of the command without it."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from published import write_models
from rich.console import Console
from typer.testing import CliRunner

from mmopd import catalog
from mmopd.cli import app
from mmopd.commands import doctor, evaluate
from mmopd.config import Mixture
from mmopd.evaluate.score import BenchmarkScore
from mmopd.evaluate.table import Results, Row
from mmopd.preflight.check import Check
from mmopd.prompts import write_shards
from mmopd.records import Prompt


def answer(*command: str, status: int = 0) -> Any:
    """Return what the command prints on stdout, read as JSON."""
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == status, done.output
    return json.loads(done.stdout)


def test_show_gives_the_recipe_its_processes_and_the_teachers_of_each_task() -> None:
    found = answer("show", "recipes/demo.yaml", "train.steps=7")
    assert found["recipe"] == catalog.load_recipe("recipes/demo.yaml", overrides=["train.steps=7"]).model_dump(
        mode="json"
    )
    assert {"student engine", "teacher text_teacher", "2 training ranks"} <= {row["process"] for row in found["starts"]}
    assert {(row["task"], row["teacher"], row["share"]) for row in found["teachers"]} == {
        ("additions", "text_teacher", 1.0),
        ("digit_sum", "image_teacher", 1.0),
    }


def test_show_gives_the_sources_of_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    turn = ({"role": "user", "content": [{"type": "text", "text": "1 + 2 ="}]},)
    write_shards([Prompt(f"a/{i}", "additions", "text", turn, (), "3") for i in range(4)], tmp_path / "sums")
    mixture = Mixture.model_validate({"sources": {"sums": {"shards": "sums", "task": "additions"}}})
    Path("mine.yaml").write_text(yaml.safe_dump(mixture.model_dump(mode="json")), encoding="utf-8")
    found = answer("show", "mine.yaml", "--prompts", "10")
    assert (found["prompts"], found["rows"], found["text_tokens"]) == (10, 4, None)
    assert found["sources"]["sums"]["epochs"] == 2.5
    assert found["sources"]["sums"]["tasks"] == [{"task": "additions", "modality": "text", "rows": 4}]


def test_show_explains_every_key_of_a_name() -> None:
    found = answer("show", "--explain", "timeout")
    assert {"train.timeout", "timeout"} <= {one["key"] for one in found}
    [lr] = answer("show", "--explain", "train.lr")
    assert (lr["file"], lr["type"], lr["default"]) == ("recipes/*.yaml", "number, > 0", "1e-06")
    assert answer("show", "--explain", "student.model")[0]["default"] is None


@pytest.mark.parametrize(("gib", "status"), [(80, 0), (8, 1)])
def test_plan_says_if_it_fits_by_status_and_value(
    gib: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_models(tmp_path))
    size = ["--gpu", "H100-80G"] if gib == 80 else ["--gpu-memory", "8", "--tflops", "100", "--bandwidth", "900"]
    found = answer("plan", "recipes/multi_teacher_2b.yaml", *size, status=status)
    assert found["fits"] == (status == 0) == (found["refusals"] == [])
    assert found["roles"][0]["peak_gib"] > 1
    assert found["step_seconds"] > 0


@pytest.mark.parametrize(("state", "status"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_says_if_the_machine_will_do(state: Any, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "machine_report", lambda: [Check("disk free", state, "1 GiB → 2", "free some")])
    found = answer("doctor", status=status)
    assert found["ok"] == (status == 0)
    assert found["checks"][0] == {
        "name": "disk free",
        "state": state,
        "found": "1 GiB → 2",
        "way_out": "free some",
        "of": "",
        "numbers": {},
    }


def test_eval_gives_its_results_also_if_a_benchmark_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    record = BenchmarkScore("m", "base", "sums", "t", "acc", "failed", "no", None, None, None, "", "", {}, {}, 0.0)

    def measured(suite: Path, models: object, recipe: object, out: Path, console: Console) -> Results:
        console.print("progress")
        return Results.of([Row("m", "base", (record,))])

    monkeypatch.setattr(evaluate, "evaluate_models", measured)
    found = answer("eval", "eval/demo.yaml", "m", status=1)  # of the UserError, which `main` prints
    assert found["rows"][0]["records"][0]["reason"] == "no"


def test_names_of_the_catalogue_are_completed_with_those_of_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/demonstration.yaml").touch()
    words = {"_MMOPD_COMPLETE": "complete_bash", "COMP_WORDS": "mmopd train recipes/dem", "COMP_CWORD": "2"}
    done = CliRunner().invoke(app, [], env=words, prog_name="mmopd")
    assert done.stdout.split() == ["recipes/demo.yaml", "recipes/demonstration.yaml"]
