"""The bridge to lmms-eval, against the real lmms-eval and a small server that answers, errs and fails as instructed."""

import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.forkserver import _forkserver  # type: ignore[attr-defined]
from pathlib import Path
from types import SimpleNamespace

import datasets
import psutil
import pytest
from answering_server import ASKED, KEY, Server, write_rows
from PIL import Image
from waiting import wait_for

from mmopd.catalog import shipped
from mmopd.config import Engine, Suite
from mmopd.config.suite import LmmsBenchmark
from mmopd.errors import UserError
from mmopd.evaluate import BenchmarkScore, Results, evaluate
from mmopd.evaluate.served import Served
from mmopd.runtime.run_folder import RunFolder
from mmopd.serving import endpoint
from mmopd.serving.endpoint import Endpoint
from mmopd.train.suite import folder_of, metrics_of, run_suite

TASKS = shipped() / "eval" / "tasks"
ADDITIONS, DIGIT_SUM = str(TASKS / "demo_additions.yaml"), str(TASKS / "demo_digit_sum.yaml")


def picture(width: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 32)).save(file, format="PNG")
    return file.getvalue()


def behave(question: str, images: list[Image.Image]) -> str:
    """Answer right, or as the question demands: wrong, with silence, or with a failure. Images are recognised by their
    width.
    """
    if "break" in question:
        raise RuntimeError("the server is broken")
    if "silent" in question:
        return ""
    if "half" in question:
        return "<think>one of two</think><answer>$0.5$</answer>"
    if images:
        return f"1+{images[0].width - 1}={images[0].width}"
    a, b = map(int, re.findall(r"\d+", question))
    return f"so {a}+{b}={a + b + ('wrongly' in question)}"


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    """Return a suite with a benchmark for each way in which a run can go; the column names the way."""
    folder = tmp_path_factory.mktemp("data")
    sums = [(10 + i, 20 + i) for i in range(10)]
    answers = [str(a + b) for a, b in sums]

    def additions(name: str, mark: Callable[[int], str], metric: str = "accuracy,none") -> LmmsBenchmark:
        rows = write_rows(
            folder / f"{name}.parquet", [f"What is {a}+{b}?{mark(i)}" for i, (a, b) in enumerate(sums)], answers
        )
        return LmmsBenchmark(column=name, task=ADDITIONS, metric=metric, data=rows, max_tokens=7)

    images = write_rows(
        folder / "images.parquet", ["sum?"] * 4, ["32", "64", "96", "128"], [picture(w) for w in (32, 64, 96, 128)]
    )
    return Suite(
        benchmarks=(
            additions("planted", lambda i: " wrongly" if i < 3 else ""),
            LmmsBenchmark(column="images", task=DIGIT_SUM, metric="accuracy,none", data=images, limit=3),
            additions("broken", lambda i: " break" if i == 9 else ""),
            additions("silent", lambda i: " silent" if i < 2 else ""),
            additions("no metric", lambda i: "", metric="exact_match,none"),
            LmmsBenchmark(
                column="DynaMath",
                task="dynamath_reasoning",
                metric="dynamath_average,none",
                data=dynamath(folder / "dynamath.parquet"),
            ),
        ),
        concurrency=4,
        timeout=300,
    )


def dynamath(path: Path) -> Path:
    """Write rows of a task that lmms-eval ships, in its own columns; `behave` answers 3 of 4 right."""
    rows = [
        {"id": str(i), "question_id": str(i), "question": "half?", "ground_truth": gold}
        for i, gold in enumerate(["0.5", r"\frac{1}{2}", "1/2", "3"])
    ]
    features = datasets.Features(
        {**dict.fromkeys(rows[0], datasets.Value("string")), "decoded_image": datasets.Image()}
    )
    datasets.Dataset.from_list(
        [{**row, "decoded_image": Image.new("RGB", (32, 32))} for row in rows], features=features
    ).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def measured(
    server: None, suite: Suite, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, BenchmarkScore], Server, Path]]:
    out = tmp_path_factory.mktemp("eval")
    with Server(behave) as answering:
        records = evaluate(answering.endpoint, suite, out=out / "out", weights="w0", cache=out / "cache")
        yield {r.column: r for r in records}, answering, out


def test_planted_wrong_answers_lower_the_score_by_just_their_share(
    measured: tuple[dict[str, BenchmarkScore], Server, Path],
) -> None:
    record = measured[0]["planted"]
    assert (record.status, record.reason, record.score, record.n) == ("ok", "", 70.0, 10)
    assert record.stderr == pytest.approx(100 * (0.7 * 0.3 / 9) ** 0.5)
    assert record.versions["lmms-eval"] == "0.7.3"
    assert record.weights == "w0"
    assert record.data
    asked = ("family", "prompt_variant", "max_pixels", "max_tokens", "temperature", "responses")
    assert [record.settings[key] for key in asked] == ["unknown", "default", None, 7, 0, 1]


def test_images_reach_the_model_and_a_limit_is_kept(measured: tuple[dict[str, BenchmarkScore], Server, Path]) -> None:
    record = measured[0]["images"]
    assert (record.status, record.score, record.n) == ("ok", 100.0, 3)


def test_a_failed_request_is_a_failed_benchmark_and_not_a_wrong_answer(
    measured: tuple[dict[str, BenchmarkScore], Server, Path],
) -> None:
    record = measured[0]["broken"]
    assert (record.status, record.score, record.n) == ("failed", None, None)
    assert "1 of 10 requests failed" in record.reason


def test_many_empty_answers_are_a_failed_benchmark(measured: tuple[dict[str, BenchmarkScore], Server, Path]) -> None:
    record = measured[0]["silent"]
    assert (record.status, record.score, record.reason) == ("failed", None, "2 of 10 answers are empty")


def test_a_missing_metric_is_a_failed_benchmark_that_names_what_there_is(
    measured: tuple[dict[str, BenchmarkScore], Server, Path],
) -> None:
    record = measured[0]["no metric"]
    assert (record.status, record.score) == ("failed", None)
    assert record.reason == "no metric 'exact_match,none'; the results have: accuracy,none"


def test_a_built_in_task_runs_on_local_rows_and_judges_mathematics(
    measured: tuple[dict[str, BenchmarkScore], Server, Path],
) -> None:
    """Check the score: with lmms-eval's default of four threads, math-verify fails silently, and this scores 0."""
    record = measured[0]["DynaMath"]
    assert (record.status, record.reason, record.score, record.n) == ("ok", "", 75.0, 4)


def test_requests_are_greedy_with_the_token_limit_of_the_suite_and_the_key_stays_out_of_sight(
    measured: tuple[dict[str, BenchmarkScore], Server, Path],
) -> None:
    _, server, out = measured
    planted = [r for r in server.requests if "wrongly" in json.dumps(r)]
    assert {(r["model"], r["max_tokens"], r["temperature"]) for r in planted} == {("mmopd-student", 7, 0)}
    assert {frozenset(r) for r in planted} == {ASKED}  # what is left out here has the server's default
    assert server.keys == {f"Bearer {KEY}"}
    assert not [path for path in out.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_valid_record_is_reused_and_a_failed_one_is_not(
    measured: tuple[dict[str, BenchmarkScore], Server, Path], suite: Suite
) -> None:
    first, server, out = measured
    kept = suite.model_copy(update={"benchmarks": suite.benchmarks[:2]})
    before, events = len(server.requests), []
    again = evaluate(
        replace(server.endpoint, name="distilled"),
        kept,
        out=out / "again",
        weights="w0",
        cache=out / "cache",
        on_result=lambda record: events.append((record.column, record.reused)),
    )
    assert len(server.requests) == before
    assert events == [("planted", True), ("images", True)]
    assert again == [replace(first[c], endpoint="distilled", reused=True) for c in ("planted", "images")]
    assert len(list((out / "cache").iterdir())) == sum(r.status == "ok" for r in first.values())


def test_other_weights_other_rows_or_other_pixels_are_measured_again_and_a_timeout_leaves_nothing_behind(
    measured: tuple[dict[str, BenchmarkScore], Server, Path], suite: Suite, tmp_path: Path
) -> None:
    def slow(question: str, images: list[Image.Image]) -> str:
        time.sleep(5)
        return "2"

    out = measured[2]
    rows = write_rows(tmp_path / "other.parquet", ["What is 1+1?"], ["2"])
    other = LmmsBenchmark(column="planted", task=ADDITIONS, metric="accuracy,none", data=rows, max_tokens=7)
    short = suite.model_copy(update={"timeout": 1})
    planted = suite.benchmarks[0]
    for weights, benchmark, served in (
        ("w1", planted, Served()),
        ("w0", other, Served()),
        ("w0", planted, Served("qwen3_vl", 1024, 65536, 1024)),
    ):
        one = short.model_copy(update={"benchmarks": (benchmark,)})
        with Server(slow) as server:
            [record] = evaluate(
                server.endpoint, one, out=tmp_path / "out", weights=weights, served=served, cache=out / "cache"
            )
        assert record.status == "failed"
        assert "not finished after 1 s" in record.reason
    assert psutil.Process(_forkserver._forkserver_pid).children(recursive=True) == []  # type: ignore[attr-defined]


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("importing", [True, False])
def test_nothing_goes_on_where_the_one_that_calls_is_killed(importing: bool, tmp_path: Path) -> None:
    """Kill the caller before its call, or during one; the call imports its libraries itself here."""
    lines = ["from pathlib import Path", "from mmopd.evaluate import calls", *["calls.PRELOAD = []"] * (not importing)]
    lines += [
        "with calls.Calls() as c:",
        f" c.run(['--tasks', 'list'], Path({str(tmp_path / 'log')!r}), {{}}, offline=True, timeout=60)",
    ]
    with subprocess.Popen([sys.executable, "-c", "\n".join(lines)]) as process:
        caller, needed = psutil.Process(process.pid), 2 if importing else 3  # one belongs to multiprocessing itself
        wait_for(lambda: len(caller.children(recursive=True)) >= needed or process.poll() is not None, every=0.05)
        started = caller.children(recursive=True)
        assert len(started) >= needed
        time.sleep(3)
        assert all(one.is_running() for one in started)
        process.kill()
    assert not psutil.wait_procs(started, timeout=10)[1]


def test_a_name_that_lmms_eval_takes_for_a_model_of_openai_is_refused(suite: Suite, tmp_path: Path) -> None:
    endpoint = Endpoint("student", "http://127.0.0.1:9", "demo1-step0", "", "student")
    with pytest.raises(UserError, match=r"'demo1-step0': lmms-eval takes every name with 'o1'"):
        evaluate(endpoint, suite, out=tmp_path)


@pytest.mark.parametrize("metric", ["llm_as_judge_eval,none", "gpt_eval_score,none", "gpt,none", "funqa_gpt,none"])
def test_a_metric_that_another_model_gives_is_refused(metric: str, tmp_path: Path) -> None:
    endpoint = Endpoint("student", "http://127.0.0.1:9", "demo", "", "student")
    suite = Suite(benchmarks=(LmmsBenchmark(column="MathVista", task="mathvista_testmini_cot", metric=metric),))
    with pytest.raises(UserError, match=f"MathVista: another model gives the metric '{metric}'"):
        evaluate(endpoint, suite, out=tmp_path)


@pytest.mark.usefixtures("measured")
def test_a_suite_between_steps_is_shared_by_the_engines_and_other_weights_have_no_score(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    has = {"a": "step-4", "b": "step-4"}
    student = SimpleNamespace(model=tmp_path / "student", engine=Engine())
    monkeypatch.setattr(RunFolder, "recipe", lambda _: SimpleNamespace(student=student))
    rows = suite.benchmarks[0].model_copy(update={"limit": 5})
    both = tuple(rows.model_copy(update={"column": column}) for column in ("one", "two"))
    planted = suite.model_copy(update={"benchmarks": both})
    monkeypatch.setattr("mmopd.train.suite.suite_between_steps", lambda _: planted)
    monkeypatch.setattr("mmopd.rollout.sync.Server.version", lambda self: has[self.name])
    with Server(behave) as a, Server(behave) as b:
        engines = [replace(one.endpoint, name=name) for one, name in ((a, "a"), (b, "b"))]
        endpoint.save(run.endpoints, engines)
        run_suite(run, 4)
        assert (len(a.requests), len(b.requests)) == (5, 5)
        first = folder_of(run, 4) / "results.json"
        records = Results.read(first).rows[0].records
        each = {"suite/one": 40.0, "suite_error/one": 24.49, "suite/two": 40.0, "suite_error/two": 24.49}
        assert metrics_of(list(records), 2) == pytest.approx(each | {"suite_failed": 0}, abs=0.01)
        has["b"] = "step-3"
        run_suite(run, 4)
        one, two = Results.read(first).rows[0].records
    assert (one.status, two.status) == ("ok", "failed")
    assert two.reason == "the student's engine has weights 'step-3', not 'step-4'"
    assert metrics_of([one, two], 2).keys() == {"suite/one", "suite_error/one", "suite_failed"}
