"""The bridge to lmms-eval, against the real lmms-eval and a small server that answers, errs and fails as instructed."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from waiting import wait_for

from mmopd.catalog import shipped
from mmopd.config import Benchmark, Suite
from mmopd.errors import UserError
from mmopd.evaluate import BenchmarkScore, Results, Row, evaluate, read_suite
from mmopd.evaluate.tasks import builtin, prepare, read_task
from mmopd.evaluate.validate import InvalidRunError, validate
from mmopd.runtime.fingerprint import hash_model
from mmopd.serving.endpoint import Endpoint

TASKS = shipped() / "eval" / "tasks"
ADDITIONS, DIGIT_SUM = str(TASKS / "demo_additions.yaml"), str(TASKS / "demo_digit_sum.yaml")
KEY = "key-of-the-test"


class Server:
    """An OpenAI-compatible server on a free port; `answer` gets the question and its images, and may raise."""

    def __init__(self, answer: Callable[[str, list[Image.Image]], str]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.keys.add(self.headers["Authorization"])
                parts = body["messages"][-1]["content"]
                text = "".join(p["text"] for p in parts if p["type"] == "text")
                urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
                images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
                try:
                    message = {"role": "assistant", "content": answer(text, images)}
                    self._reply(
                        200,
                        {
                            "id": "1",
                            "object": "chat.completion",
                            "created": 0,
                            "model": body["model"],
                            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                        },
                    )
                except RuntimeError as error:
                    self._reply(500, {"error": {"message": str(error)}})

            def _reply(self, status: int, body: object) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = Endpoint(
            "student", f"http://127.0.0.1:{self._http.server_port}", "mmopd-student", KEY, "student"
        )

    def __enter__(self) -> "Server":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()


def write_rows(path: Path, questions: list[str], answers: list[str], images: list[bytes] | None = None) -> Path:
    columns = {
        "question": questions,
        "answer": answers,
        "image": pa.array(images or [None] * len(questions), pa.binary()),
    }
    pq.write_table(pa.table(columns), path)
    return path


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

    def additions(name: str, mark: Callable[[int], str], metric: str = "accuracy,none") -> Benchmark:
        rows = write_rows(
            folder / f"{name}.parquet", [f"What is {a}+{b}?{mark(i)}" for i, (a, b) in enumerate(sums)], answers
        )
        return Benchmark(column=name, task=ADDITIONS, metric=metric, data=rows, max_tokens=7)

    images = write_rows(
        folder / "images.parquet", ["sum?"] * 4, ["32", "64", "96", "128"], [picture(w) for w in (32, 64, 96, 128)]
    )
    return Suite(
        benchmarks=(
            additions("planted", lambda i: " wrongly" if i < 3 else ""),
            Benchmark(column="images", task=DIGIT_SUM, metric="accuracy,none", data=images, limit=3),
            additions("broken", lambda i: " break" if i == 9 else ""),
            additions("silent", lambda i: " silent" if i < 2 else ""),
            additions("no metric", lambda i: "", metric="exact_match,none"),
            Benchmark(
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
        on_event=lambda b, r: events.append((b.column, r and r.reused)),
    )
    assert len(server.requests) == before
    assert sorted(events, key=str) == [("images", None), ("images", True), ("planted", None), ("planted", True)]
    assert again == [replace(first[c], endpoint="distilled", reused=True) for c in ("planted", "images")]
    assert len(list((out / "cache").iterdir())) == sum(r.status == "ok" for r in first.values())


def test_other_weights_or_other_rows_are_measured_again_and_a_timeout_leaves_nothing_behind(
    measured: tuple[dict[str, BenchmarkScore], Server, Path], suite: Suite, tmp_path: Path
) -> None:
    _, server, out = measured
    rows = write_rows(tmp_path / "other.parquet", ["What is 1+1?"], ["2"])
    other = Benchmark(column="planted", task=ADDITIONS, metric="accuracy,none", data=rows, max_tokens=7)
    short = suite.model_copy(update={"timeout": 1})
    for weights, benchmark in (("w1", suite.benchmarks[0]), ("w0", other)):
        one = short.model_copy(update={"benchmarks": (benchmark,)})
        [record] = evaluate(server.endpoint, one, out=tmp_path / "out", weights=weights, cache=out / "cache")
        assert record.status == "failed"
        assert "not finished after 1 s" in record.reason
    assert all(
        process.ppid() == os.getpid() for process in psutil.Process().children(recursive=True)
    )  # a child forks the calls


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


# Conditions for a valid run, on results as lmms-eval writes them.


def write_run(folder: Path, *, score: object = 0.5, asked: int = 2, answers: tuple[str, ...] = ("4", "5")) -> Path:
    results = {
        "results": {"t": {"accuracy,none": score, "accuracy_stderr,none": "N/A"}},
        "n-samples": {"t": {"original": 2, "effective": asked}},
        "versions": {"t": 1},
    }
    folder.mkdir(exist_ok=True)
    (folder / "1_results.json").write_text(json.dumps(results))
    (folder / "1_samples_t.jsonl").write_text(
        "".join(json.dumps({"filtered_resps": a}, ensure_ascii=False) + "\n" for a in answers)
    )
    return folder


ROW = Benchmark(column="c", task="t", metric="accuracy,none")


def test_a_whole_run_counts_even_with_odd_line_breaks_in_an_answer(tmp_path: Path) -> None:
    measured = validate(write_run(tmp_path, answers=("4\u2028", "5\r")), "t", ROW, rows=2)
    assert (measured.score, measured.stderr, measured.n) == (50.0, None, 2)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ({"score": "99.81%"}, "is '99.81%', not a finite number"),
        ({"score": float("nan")}, "not a finite number"),
        ({"score": 50}, "outside 0 to 1"),
        ({"asked": 1}, "1 questions were asked, expected 2"),
        ({"answers": ("4",)}, "1 answers for 2 questions"),
        ({"answers": ("4", "[LMMS_EVAL_BUDGET_EXCEEDED]")}, "1 of 2 requests failed"),
        ({"answers": ("4", " ")}, "1 of 2 answers are empty"),
    ],
)
def test_a_run_that_is_not_whole_does_not_count(tmp_path: Path, run: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRunError, match=re.escape(reason)):
        validate(write_run(tmp_path, **run), "t", ROW, rows=2)


def test_a_run_without_results_or_with_two_does_not_count(tmp_path: Path) -> None:
    with pytest.raises(InvalidRunError, match="0 results files"):
        validate(tmp_path, "t", ROW, rows=2)
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    with pytest.raises(InvalidRunError, match="2 results files"):
        validate(tmp_path, "t", ROW, rows=2)


def test_local_rows_that_were_not_all_asked_do_not_count(tmp_path: Path) -> None:
    with pytest.raises(InvalidRunError, match="2 questions were asked, expected 3"):
        validate(write_run(tmp_path), "t", ROW, rows=3)


# Suites and their task files.


@pytest.mark.parametrize("path", sorted((shipped() / "eval").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_suite_names_tasks_that_have_its_metrics(path: Path) -> None:
    for benchmark in read_suite(path, Path("/workspace")).benchmarks:
        own = Path(benchmark.task)
        settings = read_task(own if own.is_absolute() else builtin(benchmark.task))
        metric, _, filtered = benchmark.metric.partition(",")
        assert metric in [m["metric"] for m in settings["metric_list"]]
        assert filtered in [f["name"] for f in settings.get("filter_list", [{"name": "none"}])]


def test_data_is_found_from_the_workspace_and_tasks_from_the_folder_of_the_suite(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(
        "benchmarks: [{column: A, task: mine/a.yaml, metric: m, data: rows/a.parquet}]"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.yaml").write_text("task: a")
    [benchmark] = read_suite(tmp_path / "suite.yaml", Path("/workspace")).benchmarks
    assert benchmark.task == str(tmp_path / "mine" / "a.yaml")
    assert benchmark.data == Path("/workspace/rows/a.parquet")


def test_local_rows_go_to_the_split_that_a_built_in_task_reads(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", ["q"], ["a"])
    benchmark = Benchmark(column="DocVQA", task="docvqa_val", metric="anls,none", data=rows)
    task = prepare(benchmark, tmp_path / "task")
    written = read_task(tmp_path / "task" / "task.yaml")
    assert (task.name, task.rows) == ("mmopd_docvqa_val", 1)
    assert (written["dataset_path"], written["dataset_name"]) == ("parquet", None)
    assert written["dataset_kwargs"] == {"data_files": {"validation": str(rows)}}
    assert prepare(benchmark.model_copy(update={"data": None}), tmp_path / "unused").folder is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "docvqa_vall"}, "lmms-eval has no task 'docvqa_vall'"),
        ({"data": Path("/nowhere/rows.parquet")}, "/nowhere/rows.parquet: no such file"),
        ({"data": Path(__file__)}, "test_evaluate.py: not a complete parquet file"),
    ],
)
def test_a_benchmark_that_cannot_run_says_why(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = write_rows(tmp_path / "rows.parquet", ["q"], ["a"])
    benchmark = Benchmark(column="DocVQA", task="docvqa_val", metric="anls,none", data=rows).model_copy(update=change)
    with pytest.raises(UserError, match=re.escape(message)):
        prepare(benchmark, tmp_path / "task")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("benchmarks: [{column: A, task: nope.yaml, metric: m}]", "A: no task file 'nope.yaml'"),
        (
            "benchmarks: [{column: A, task: x, metric: m}, {column: A, task: y, metric: m}]",
            "two benchmarks have the column 'A'",
        ),
        ("benchmarks: [{column: A, task: x, metrics: m}]", "did you mean 'metric'?"),
    ],
)
def test_a_suite_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_suite(tmp_path / "suite.yaml", tmp_path)


def test_a_model_is_known_by_its_weights_and_processor(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("words")
    first = hash_model(tmp_path)
    (tmp_path / "README.md").write_text("other words")
    assert hash_model(tmp_path) == first
    (tmp_path / "chat_template.jinja").write_text("template")
    assert hash_model(tmp_path) != first


# The table.


def record(model: str, column: str, score: float | None) -> BenchmarkScore:
    return BenchmarkScore(
        endpoint=model,
        role="student",
        column=column,
        task="t",
        metric="m",
        status="failed" if score is None else "ok",
        reason="1 of 2 requests failed" if score is None else "",
        score=score,
        stderr=None if score is None else 1.25,
        n=None if score is None else 400,
        weights="w",
        data="d",
        settings={},
        versions={},
        seconds=1.0,
    )


@pytest.fixture
def results() -> Results:
    def row(name: str, kind: Any, *scores: float | None) -> Row:
        return Row(
            name,
            kind,
            tuple(record(name, c, s) for c, s in zip(("Additions", "Digit sums", "Other"), scores, strict=True)),
        )

    return Results.of(
        [
            row("base", "base", 95.0, 40.0, 50.0),
            row("text_teacher", "teacher", 95.5, 38.0, None),
            row("image_teacher", "teacher", 90.0, 86.0, None),
            row("distilled", "distilled", 96.0, 68.0, 50.0),
        ]
    )


def test_the_gap_is_to_the_best_teacher_and_only_where_there_is_one(results: Results) -> None:
    assert results.gaps_closed() == {
        "Additions": None,
        "Digit sums": pytest.approx((68 - 40) / (86 - 40)),
        "Other": None,
    }


def test_a_failed_benchmark_shows_as_failed_and_never_as_a_number(results: Results) -> None:
    lines = results.markdown().splitlines()
    assert lines[0] == "|  | Additions | Digit sums | Other |"
    assert lines[2] == "| base | 95.0 ± 1.2 | 40.0 ± 1.2 | 50.0 ± 1.2 |"
    assert lines[3].endswith("| failed |")
    assert lines[6] == "| *gap closed* | – | 61% | – |"
    assert "text_teacher, Other: failed: 1 of 2 requests failed" in lines
    assert "text_teacher,teacher,Other,t,m,failed,,,,1.0,w,d,1 of 2 requests failed" in results.csv().splitlines()


def test_results_survive_the_way_through_a_file(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path)
    assert Results.read(tmp_path / "results.json") == results
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.md", "results.csv"}
    assert results.rich().row_count == 4
