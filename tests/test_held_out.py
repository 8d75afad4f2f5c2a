"""The evaluation between steps: which rows, which scores, when none, and what a recipe may say."""

import asyncio
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmopd import catalog
from mmopd.algorithm.settings import Algorithm
from mmopd.config import Suite
from mmopd.config.evaluation import Evaluation
from mmopd.config.suite import LmmsBenchmark
from mmopd.errors import ConfigError, DataError
from mmopd.evaluate import BenchmarkScore, Results, table
from mmopd.modality import Encoder
from mmopd.prompts.shards import Shards
from mmopd.records import Outcome, Response
from mmopd.report.charts import Tasks, held_out_curves
from mmopd.report.metrics import documented
from mmopd.report.run_files import RunFiles
from mmopd.rollout.student_client import EngineError, PromptRefusedError
from mmopd.runtime.run_folder import RunFolder
from mmopd.train.distributed import Ranks
from mmopd.train.held_out import HeldOut, Row, chosen, held_out_sources, mean_score, scores
from mmopd.train.suite import SuiteRuns, folder_of


class OneRank(Ranks):
    """A rank that is alone, without a process group."""

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the value of this rank."""
        return [value]

    def all_max(self, values: Any) -> list[float]:
        """Return the values of this rank."""
        return list(map(float, values))


class Engine:
    """An engine that answers with the key of a row, or with what a test says."""

    def __init__(self, version: str = "step-3", fault: Exception | None = None) -> None:
        self.version = version
        self.fault = fault
        self.asked: list[tuple[str, int, int, dict[str, Any]]] = []

    async def sample(self, encoded: Any, n: int, seed: int, **sampling: Any) -> list[Response]:
        """Answer a row."""
        self.asked.append((encoded.prompt.key, n, seed, sampling))
        if self.fault is not None and len(self.asked) == 2:
            raise self.fault
        right = len(self.asked) % 2
        text = encoded.prompt.answer if right else "nothing"
        return [Response((1, 2), (-1.0, -1.0), text, "stop" if right else "length", ((self.version, 2),))] * n


class Judge:
    """A verifier that compares texts; it knows nothing about one row."""

    def __init__(self, unknown: str = "") -> None:
        self.unknown = unknown

    async def verify(self, task: str, response: str, answer: str) -> Outcome:
        """Judge."""
        return Outcome(math.nan, "timeout") if answer == self.unknown else Outcome(float(response == answer))


@pytest.fixture(scope="session")
def world(workspace: Path) -> Path:
    return workspace / ".mmopd" / "demo"


@pytest.fixture(scope="session")
def additions(world: Path) -> Shards:
    return Shards(world / "shards" / "additions", "additions")


@pytest.fixture(scope="session")
def encoder(world: Path) -> Encoder:
    return Encoder(world / "base")


def held_out(additions: Shards, encoder: Encoder, folder: Path, **settings: Any) -> HeldOut:
    evaluate = Evaluation.model_validate({"mixture": "data/x.yaml", "rows": 8} | settings)
    rollout = SimpleNamespace(concurrency=4, max_tokens=24)
    recipe: Any = SimpleNamespace(algorithm=Algorithm(), rollout=rollout, evaluate=evaluate)
    ranks = OneRank(0, 1, torch.device("cpu"), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmopd.train.held_out.held_out_sources", lambda *_: {"additions": additions})
        return HeldOut(RunFolder(folder), recipe, {}, encoder, ranks=ranks, done=0, stopping=lambda: False)


def measure(evaluation: HeldOut, engine: Engine, judge: Judge | None = None) -> dict[str, float]:
    fakes: Any = ([engine], judge or Judge())
    return asyncio.run(evaluation.measure(3, *fakes))


@pytest.fixture(autouse=True)
def closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close what a test opens."""
    opened: list[HeldOut] = []
    init = HeldOut.__init__

    def noted(self: HeldOut, *args: Any, **more: Any) -> None:
        init(self, *args, **more)
        opened.append(self)

    monkeypatch.setattr(HeldOut, "__init__", noted)
    with ExitStack() as stack:
        yield
        for one in opened:
            stack.enter_context(one)


def test_the_same_rows_are_asked_with_the_same_seeds_each_time_and_scored(
    additions: Shards, encoder: Encoder, tmp_path: Path
) -> None:
    evaluation = held_out(additions, encoder, tmp_path, attempts=2, temperature=0.7)
    first, again = Engine(), Engine()
    found = measure(evaluation, first)
    assert measure(evaluation, again) == found
    assert first.asked == again.asked
    assert len({seed for _, _, seed, _ in first.asked}) == len({key for key, *_ in first.asked}) == 8
    assert first.asked[0][3] == {"max_tokens": 24, "temperature": 0.7, "top_p": 1.0, "top_k": 0}
    assert found["held_out/additions"] == 0.5
    assert found["held_out_error/additions"] == pytest.approx(math.sqrt(8 * 0.25 / 7) / math.sqrt(8))
    assert (found["held_out_cut"], found["held_out_unknown"], found["held_out_failed"]) == (8, 0, 0)
    assert all(map(documented, found))
    lines = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [3, 3]
    assert lines[0]["held_out/additions"] == 0.5


def test_rows_are_evenly_spaced_over_the_source(additions: Shards, encoder: Encoder) -> None:
    keys = [encoded.prompt.key for encoded in chosen(additions, 3, encoder)]
    assert keys == [additions[row].key for row in (0, len(additions) // 3, 2 * len(additions) // 3)]
    assert len(chosen(additions, 10**6, encoder)) == len(additions)


@pytest.mark.parametrize(
    "engine", [Engine(version="step-2"), Engine(version="fresh"), Engine(fault=EngineError("it ended"))]
)
def test_a_lost_engine_or_other_weights_give_no_score(
    engine: Engine, additions: Shards, encoder: Encoder, tmp_path: Path
) -> None:
    found = measure(held_out(additions, encoder, tmp_path), engine)
    assert found == {"held_out_failed": 1.0}
    assert mean_score(found) is None
    assert not (tmp_path / "held_out.jsonl").read_text(encoding="utf-8")


def test_what_the_verifier_or_the_engine_cannot_take_is_unknown_and_not_wrong(
    additions: Shards, encoder: Encoder, tmp_path: Path
) -> None:
    evaluation = held_out(additions, encoder, tmp_path)
    whole = measure(evaluation, Engine())
    unknown = measure(evaluation, Engine(), Judge(unknown=additions[0].answer))
    assert unknown["held_out_unknown"] >= 1
    assert unknown["held_out/additions"] != whole["held_out/additions"]
    refused = measure(evaluation, Engine(fault=PromptRefusedError("too long")))
    assert (refused["held_out_unknown"], refused["held_out_failed"]) == (1, 0)


def test_a_source_with_one_row_has_no_error_and_one_without_usable_rows_is_an_error(
    additions: Shards, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = scores([Row("a", 1.0, 0, 0), Row("b", None, 0, 2)])
    assert math.isnan(found["held_out_error/a"])
    assert "held_out/b" not in found
    monkeypatch.setattr(Encoder, "encode", lambda *_: (_ for _ in ()).throw(ValueError("no template")))
    with pytest.raises(DataError, match=r"source 'additions': none of its held-out rows can be used; .*no template"):
        chosen(additions, 4, encoder)


def test_a_source_that_is_trained_on_is_refused_by_name(
    additions: Shards, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = world / "shards" / "additions"
    (tmp_path / "mine.yaml").write_text(
        f"sources: {{sums: {{shards: {shards}, task: additions, weight: 1}}}}\n", encoding="utf-8"
    )
    recipe: Any = SimpleNamespace(
        evaluate=Evaluation(mixture=tmp_path / "mine.yaml"), student=SimpleNamespace(model=world / "base")
    )
    assert held_out_sources(recipe, {}).keys() == {"sums"}
    with pytest.raises(ConfigError, match=r"evaluate.mixture: source 'sums' of .*mine.yaml has the rows of source 'a'"):
        held_out_sources(recipe, {"a": additions})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["train.keep_best=1", "train.checkpoint_every=15"], "is no multiple of evaluate.every = 10"),
        (
            ["algorithm={objective: {kind: expo}, difficulty: null, balance: null, margin: null}"],
            "`expo` has no steps",
        ),
        (["evaluate={every: 5}"], r"name held-out rows \(`mixture`\), benchmarks \(`suite`\), or both"),
        (["evaluate={mixture: data/x.yaml, limit: 5}"], "it limits the benchmarks of `suite`"),
    ],
)
def test_a_recipe_that_cannot_be_evaluated_as_it_says_is_refused(more: list[str], said: str) -> None:
    overrides = [*(["evaluate={mixture: data/x.yaml}"] if not more[0].startswith("evaluate") else []), *more]
    with pytest.raises(ConfigError, match=said):
        catalog.load_recipe("recipes/demo.yaml", overrides=overrides)


def test_a_run_without_a_suite_is_not_damaged(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    Results.of([]).write(tmp_path)
    files = RunFiles(run)
    files.results()
    assert not [one for one in files.left_out if "results.json" in str(one)]


def test_the_report_draws_the_scores_with_intervals_and_names_damage(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    lines = [{"step": 0, "held_out/sums": 0.5, "held_out_error/sums": 0.05}, {"step": 10, "held_out/sums": 0.99}]
    run.held_out.write_text("\n".join(map(json.dumps, lines)) + "\nnonsense\n", encoding="utf-8")
    files = RunFiles(run)
    (chart,) = held_out_curves(files.held_out(), Tasks(["sums"]))
    assert chart["x"] == [0, 10]
    (line,) = chart["series"]
    assert (line["y"], line["low"]) == ([0.5, 0.99], [pytest.approx(0.5 - 1.96 * 0.05), 0.99])
    assert line["colour"] == "t1"
    assert any("not JSON" in str(one) for one in files.left_out)
    assert held_out_curves([], Tasks([])) == []
    rows = [{"step": 0, "suite/AIME": 12.5, "suite_error/AIME": 5.0}, {"step": 10, "suite/AIME": 25.0}]
    (chart,) = held_out_curves(rows, Tasks([]))
    assert chart["title"] == "Benchmarks between steps"
    (line,) = chart["series"]
    assert (line["y"], line["low"]) == ([0.125, 0.25], [pytest.approx(0.125 - 1.96 * 0.05), 0.25])


def test_the_suite_runs_in_a_process_that_a_stop_request_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Run other programs in its place: one that sleeps, one that fails, one that writes results."""
    run = RunFolder(tmp_path)
    run.logs.mkdir()
    program = ["import time; time.sleep(600)"]
    monkeypatch.setattr("mmopd.train.suite.python.command", lambda *_: [sys.executable, "-c", program[0]])
    suite = Suite(benchmarks=tuple(LmmsBenchmark(column=c, task="t", metric="m") for c in "ab"))
    with closing(SuiteRuns(run, suite)) as runs:
        begin = time.monotonic()
        assert asyncio.run(runs.scores(1, lambda: time.monotonic() > begin + 1)) == {"suite_failed": 2}
        program[0] = "raise SystemExit('the judge is not here')"
        assert asyncio.run(runs.scores(2, lambda: False)) == {"suite_failed": 2}
        assert f"no results after step 2; {run.logs / 'suite.log'} says why" in caplog.text
        assert "the judge is not here" in (run.logs / "suite.log").read_text(encoding="utf-8")
        record = {"endpoint": "s", "role": "student", "task": "t", "metric": "m", "reason": "", "n": 9, "weights": ""}
        record |= {"data": "", "settings": {}, "versions": {}, "seconds": 1.0}
        good = BenchmarkScore(**record, column="a", status="ok", score=25.0, stderr=None)  # type: ignore[arg-type]
        bad = replace(good, column="b", status="failed", score=None, reason="no metric 'm'")
        Results.of([table.Row("step 3", "distilled", (good, bad))]).write(folder_of(run, 3))
        program[0] = ""
        assert asyncio.run(runs.scores(3, lambda: False)) == {"suite/a": 25.0, "suite_failed": 1}
        assert "b has no score after step 3: no metric 'm'" in caplog.text
