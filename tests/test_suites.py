"""Evaluation without a run: results that count, suites and their task files, and the table."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from answering_server import write_rows

from mmopd.catalog import shipped
from mmopd.config.suite import LmmsBenchmark, SampledBenchmark
from mmopd.errors import UserError
from mmopd.evaluate import BenchmarkScore, Results, Row, read_suite
from mmopd.evaluate.sampled.known import find
from mmopd.evaluate.score import InvalidRunError
from mmopd.evaluate.tasks import builtin, prepare, read_task
from mmopd.evaluate.validate import last_words, validate
from mmopd.runtime.fingerprint import hash_model

# Conditions for a valid run, on results as lmms-eval writes them.


def write_run(folder: Path, *, score: object = 0.5, asked: int = 2, answers: tuple[str, ...] = ("4", "5")) -> Path:
    results = {
        "results": {"t": {"accuracy,none": score, "accuracy_stderr,none": "N/A"}},
        "n-samples": {"t": {"original": 2, "effective": asked}},
        "versions": {"t": 1},
        "configs": {"t": {"generation_kwargs": {"max_new_tokens": 7}, "repeats": 1}},
    }
    folder.mkdir(exist_ok=True)
    (folder / "1_results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "1_samples_t.jsonl").write_text(
        "".join(json.dumps({"filtered_resps": a}, ensure_ascii=False) + "\n" for a in answers), encoding="utf-8"
    )
    return folder


ROW = LmmsBenchmark(column="c", task="t", metric="accuracy,none")


def test_a_whole_run_counts_even_with_odd_line_breaks_in_an_answer(tmp_path: Path) -> None:
    measured = validate(write_run(tmp_path, answers=("4\u2028", "5\r")), "t", ROW, rows=2)
    assert (measured.score, measured.stderr, measured.n) == (50.0, None, 2)
    assert measured.sent == {"max_tokens": 7, "temperature": 0, "responses": 1}


@pytest.mark.parametrize(
    ("score", "scale", "error"),
    [(0.5, 1, 50.0), (50.0, 100, 50.0), (0.501, 1, None), (0.4, 1, None)],  # the error of the mean of 1 and 0
)
def test_a_score_that_is_the_mean_of_verdicts_has_an_error_also_where_lmms_eval_gives_none(
    tmp_path: Path, score: float, scale: float, error: float | None
) -> None:
    run = write_run(tmp_path, score=score)
    samples = [{"doc_id": i, "filtered_resps": "4", "accuracy": {"scores": [right]}} for i, right in enumerate((1, 0))]
    (run / "1_samples_t.jsonl").write_text("\n".join(map(json.dumps, samples)), encoding="utf-8")
    measured = validate(run, "t", ROW.model_copy(update={"scale": scale}), rows=2)
    assert measured.stderr == error


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


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("one\n\x1b[31mtwo\x1b[0m\n\n", "two"),
        ("KeyError: 'ID'\n\nThe above\ntenacity.RetryError: RetryError[<raised KeyError>]\n", "KeyError: 'ID'"),
        ("tenacity.RetryError: RetryError[<raised KeyError>]\n", "tenacity.RetryError: RetryError[<raised KeyError>]"),
        ("KeyError: 'image'\n\rModel Responding:   0%|          | 0/8 [00:00<?, ?it/s]\n", "KeyError: 'image'"),
        (" \n", "nothing was logged"),
    ],
)
def test_the_last_words_of_a_log_name_the_error(tmp_path: Path, log: str, said: str) -> None:
    (tmp_path / "log.txt").write_text(log, encoding="utf-8")
    assert last_words(tmp_path / "log.txt") == said


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
        if isinstance(benchmark, SampledBenchmark):
            assert find(benchmark.benchmark).source.hub
            continue
        own = Path(benchmark.task)
        settings = read_task(own if own.is_absolute() else builtin(benchmark.task))
        metric, _, filtered = benchmark.metric.partition(",")
        assert metric in [m["metric"] for m in settings["metric_list"]]
        assert filtered in [f["name"] for f in settings.get("filter_list", [{"name": "none"}])]


def test_data_is_found_from_the_workspace_and_tasks_from_the_folder_of_the_suite(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(
        "benchmarks: [{column: A, task: mine/a.yaml, metric: m, data: rows/a.parquet}]", encoding="utf-8"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.yaml").write_text("task: a", encoding="utf-8")
    [benchmark] = read_suite(tmp_path / "suite.yaml", Path("/workspace")).benchmarks
    assert benchmark.task == str(tmp_path / "mine" / "a.yaml")
    assert benchmark.data == Path("/workspace/rows/a.parquet")


def test_local_rows_go_to_the_split_that_a_built_in_task_reads(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", ["q"], ["a"])
    benchmark = LmmsBenchmark(column="MMMU", task="mmmu_val", metric="mmmu_acc,none", data=rows)
    task = prepare(benchmark, tmp_path / "task")
    written = read_task(tmp_path / "task" / "task.yaml")
    assert (task.name, task.rows) == ("mmopd_mmmu_val", 1)
    assert (written["dataset_path"], written["dataset_name"]) == ("parquet", None)
    assert written["dataset_kwargs"] == {"data_files": {"validation": str(rows)}}
    assert prepare(benchmark.model_copy(update={"data": None}), tmp_path / "unused").folder is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "docvqa_vall"}, "lmms-eval has no task 'docvqa_vall'"),
        ({"data": Path("/nowhere/rows.parquet")}, "/nowhere/rows.parquet: no such file"),
        ({"data": Path(__file__)}, "test_suites.py: not a complete parquet file"),
    ],
)
def test_a_benchmark_that_cannot_run_says_why(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = write_rows(tmp_path / "rows.parquet", ["q"], ["a"])
    benchmark = LmmsBenchmark(column="DocVQA", task="docvqa_val", metric="anls,none", data=rows).model_copy(
        update=change
    )
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
        ("benchmarks: [{runner: sample, column: A}]", "benchmarks.0: no runner 'sample'; did you mean 'sampled'?"),
        ("benchmarks: [{runner: 3, column: A}]", "benchmarks.0: no runner '3'; there is lmms, sampled"),
        (
            "benchmarks: [{runner: sampled, column: A, benchmark: aime_2024, n: 2, tempature: 1}]",
            "unknown key 'benchmarks.0.tempature'; did you mean 'temperature'?",
        ),
        ("benchmarks: [{runner: sampled, column: A, n: 2}]", "benchmarks.0.benchmark: missing (Which one: prompt"),
        (
            "benchmarks: [{runner: sampled, column: A, benchmark: aime_2024, n: 2, k: [1, 4]}]",
            "benchmarks.0: k: pass@4 needs at least as many responses, and n is 2",
        ),
    ],
)
def test_a_suite_that_cannot_be_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "suite.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)):
        read_suite(tmp_path / "suite.yaml", tmp_path)


def test_a_model_is_known_by_its_weights_and_processor(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "README.md").write_text("words", encoding="utf-8")
    first = hash_model(tmp_path)
    (tmp_path / "README.md").write_text("other words", encoding="utf-8")
    assert hash_model(tmp_path) == first
    (tmp_path / "chat_template.jinja").write_text("template", encoding="utf-8")
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
        settings={"prompt_variant": "qwen3_vl", "max_pixels": 65536, "max_tokens": 32},
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
    assert (
        "text_teacher,teacher,Other,t,m,failed,,,,1.0,w,d,1 of 2 requests failed,,qwen3_vl,,65536,,,32,,,,,,,,"
        in results.csv().splitlines()
    )


def test_results_survive_the_way_through_a_file(results: Results, tmp_path: Path) -> None:
    results.write(tmp_path)
    assert Results.read(tmp_path / "results.json") == results
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.md", "results.csv"}
    assert results.rich().row_count == 4
