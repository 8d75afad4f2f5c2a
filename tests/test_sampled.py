"""Benchmarks that mmopd samples itself: what is asked, what is kept, what is judged, and what has no score."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sampled_server import PlantedServer, arena_rows, write_jsonl

from mmopd.config import Suite
from mmopd.config.suite import SampledBenchmark
from mmopd.errors import ConfigError, DataError, UserError
from mmopd.evaluate import BenchmarkScore, Results, Row, evaluate
from mmopd.evaluate.sampled import known, mathematics
from mmopd.evaluate.sampled.base import Problem, Sample, Verdict
from mmopd.evaluate.sampled.judging import judge_all, score, without_thoughts
from mmopd.evaluate.sampled.mathematics import MathVerify
from mmopd.evaluate.sampled.passk import pass_at_k
from mmopd.evaluate.score import InvalidRunError, mean_and_error
from mmopd.modality import Encoder

ANSWERS = [*range(100, 130)]  # of the 30 problems


def suite_of(data: Path | None, *, concurrency: int = 4, timeout: int = 300, **settings: Any) -> Suite:
    row = SampledBenchmark(
        **{"runner": "sampled", "column": "HMMT", "benchmark": "hmmt_feb_2025", "n": 2, "max_tokens": 200, **settings},
        data=data,
    )
    return Suite(benchmarks=(row,), concurrency=concurrency, timeout=timeout)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "hmmt.jsonl", arena_rows(ANSWERS))


def number(prompt: str) -> int:
    """Return the number of the problem in a prompt."""
    return int(re.findall(r"What is x(\d+)\?", prompt)[0])


def right(prompt: str, seed: int) -> str:
    return f"so it is \\boxed{{{ANSWERS[number(prompt) - 1]}}}."


def measure(server: PlantedServer, suite: Suite, out: Path, model: Path | None, **given: Any) -> BenchmarkScore:
    [record] = evaluate(server.endpoint, suite, out=out, **{"model": model, **given})
    return record


def kept(out: Path) -> list[dict[str, Any]]:
    [path] = out.rglob("samples.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# pass@k


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_right_response(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([i < c for i in range(n)], k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_1_is_the_mean_and_more_draws_than_responses_are_refused() -> None:
    assert pass_at_k(1000, 250, 1) == 0.25
    assert pass_at_k(1000, 1, 1000) == 1
    for k in (0, 3):
        with pytest.raises(ConfigError, match=rf"pass@{k} needs at least {k} responses to each problem, and there are"):
            pass_at_k(2, 1, k)


def test_the_error_is_that_of_the_mean_over_problems() -> None:
    assert mean_and_error([0.0, 100.0]) == (50.0, pytest.approx(50.0))
    assert mean_and_error([100.0]) == (100.0, None)


# Thoughts


@pytest.mark.parametrize(
    ("text", "opened", "answer"),
    [
        ("5", False, "5"),
        ("<think>4?</think>5", False, "5"),
        ("4?</think>5", True, "5"),
        ("4?</think>5", False, "5"),
        ("<think>4", False, None),
        ("4", True, None),
        ("<think>4?</think>5<think>6", False, None),
        ("<think>1</think>2<think>3</think>4", False, "4"),
    ],
)
def test_thoughts_are_removed_and_one_that_does_not_end_has_no_answer(
    text: str, opened: bool, answer: str | None
) -> None:
    assert without_thoughts(text, opened=opened) == answer


# A whole benchmark


def test_planted_answers_get_the_known_score_with_pass_at_k_cut_responses_and_every_sample(
    model: Path, encoder: Encoder, data: Path, tmp_path: Path
) -> None:
    seen: Counter[int] = Counter()

    def answer(prompt: str, seed: int) -> str:
        p = number(prompt)
        seen[p] += 1
        if p <= 10:  # right each time
            return f"<think>\\boxed{{1}}</think>The answer is \\boxed{{\\frac{{{2 * ANSWERS[p - 1]}}}{{2}}}}."
        if p <= 20:  # right every second time
            return f"\\boxed{{{ANSWERS[p - 1] + seen[p] % 2}}}"
        if p <= 25:  # never judged: the answer is in a thought without an end
            return f"<think>\\boxed{{{ANSWERS[p - 1]}}}"
        return "x" * 500 + right(prompt, seed)  # cut before the answer

    with PlantedServer(encoder, answer) as server:
        record = measure(server, suite_of(data, n=4, k=(2, 4)), tmp_path, model)
    assert (record.status, record.reason, record.n) == ("ok", "", 30)
    assert record.score == pytest.approx(100 * (10 + 5) / 30)
    assert record.stderr == pytest.approx(mean_and_error([100.0] * 10 + [50.0] * 10 + [0.0] * 10)[1])
    assert record.more["pass@2"] == pytest.approx(100 * (10 + 10 * (1 - 1 / 6)) / 30)
    assert record.more["pass@4"] == pytest.approx(100 * 20 / 30)
    assert record.more["cut"] == pytest.approx(100 * 10 / 30)
    assert (record.task, record.metric) == ("hmmt_feb_2025", "pass@1")
    assert record.settings["responses"] == 4
    samples = kept(tmp_path)
    assert len(samples) == 120
    assert {(s["key"], s["i"]) for s in samples} == {(str(p), i) for p in range(1, 31) for i in range(4)}
    assert all(s["right"] for s in samples if int(s["key"]) <= 10)
    [cut] = {(s["finish"], s["tokens"], s["right"]) for s in samples if int(s["key"]) > 25}
    assert cut == ("length", 200, False)
    assert {s["reason"] for s in samples if 20 < int(s["key"]) <= 25} == {"the thought does not end"}


def test_requests_are_those_of_the_row_and_no_two_seeds_of_a_problem_are_equal(
    model: Path, encoder: Encoder, data: Path, tmp_path: Path
) -> None:
    with PlantedServer(encoder, right) as server:
        record = measure(server, suite_of(data, n=3, top_p=0.9, temperature=0.7), tmp_path, model)
        requests = server.fake.requests
    assert record.score == 100
    assert len(set(server.seeds)) == 90
    assert sorted(server.seeds) == sorted(sample["seed"] for sample in kept(tmp_path))
    [sampling] = {tuple(sorted((k, v) for k, v in r["sampling_params"].items() if k not in {"seed", "logit_bias"}))
                  for r in requests}  # fmt: skip
    assert dict(sampling) == {
        "n": 1,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "max_tokens": 200,
        "logprobs": 0,
        "detokenize": False,
    }
    prompts = {encoder.tokenizer.decode(r["token_ids"]) for r in requests}
    assert len(prompts) == 30
    assert all("Put your final answer within \\boxed{}.\n\nWhat is x" in prompt for prompt in prompts)


def test_another_seed_of_the_row_changes_every_seed(model: Path, encoder: Encoder, data: Path, tmp_path: Path) -> None:
    seeds: list[set[int]] = []
    for seed in (42, 43):
        with PlantedServer(encoder, right) as server:
            measure(server, suite_of(data, seed=seed), tmp_path, model)
            seeds.append(set(server.seeds))
    assert not seeds[0] & seeds[1]


# What is known is not asked for again


def test_an_evaluation_that_was_killed_asks_for_no_response_twice(
    model: Path, encoder: Encoder, data: Path, tmp_path: Path
) -> None:
    """Kill a process of its own in the middle; a later one asks for the rest alone."""
    (tmp_path / "suite.yaml").write_text(
        "benchmarks: [{runner: sampled, column: HMMT, benchmark: hmmt_feb_2025, n: 2, max_tokens: 200, "
        f"data: {data}}}]\nconcurrency: 2",
        encoding="utf-8",
    )
    call = "from mmopd.evaluate import evaluate, read_suite\nfrom mmopd.serving.endpoint import Endpoint\n" + (
        "from pathlib import Path\nimport sys\nurl, here, model = sys.argv[1:]\nhere = Path(here)\n"
        "suite = read_suite(here / 'suite.yaml', here)\n"
        "[r] = evaluate(Endpoint('fake', url, 'tiny', 'k', 'teacher'), suite, out=here / 'out', model=Path(model),"
        " weights='w', cache=here / 'cache')\nprint(r.status, r.score, r.reused)\n"
    )
    with PlantedServer(encoder, right, delay=0.2) as server:
        command = [sys.executable, "-c", call, server.endpoint.url, str(tmp_path), str(model)]
        with subprocess.Popen(command) as process:
            while len(server.fake.requests) < 12:
                assert process.poll() is None
                os.sched_yield()
            os.kill(process.pid, signal.SIGKILL)
        [file] = (tmp_path / "cache" / "responses").iterdir()
        with file.open("a", encoding="utf-8") as end:
            end.write('[3, {"key": "2"')  # cut in the middle of a line
        done = len(file.read_bytes().splitlines()) - 2
        asked = len(server.seeds)
        assert asked - 2 <= done + 2 <= asked + 2
        server.fake.delay = 0.0
        found = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
        assert found.split() == ["ok", "100.0", "False"]
        assert len(server.seeds) - asked == 60 - done
        again = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
        assert again.split() == ["ok", "100.0", "True"]
        assert len(server.seeds) == asked + 60 - done


def test_only_the_same_weights_settings_and_data_go_on_and_more_responses_add_to_those_that_are_there(
    model: Path, encoder: Encoder, data: Path, tmp_path: Path
) -> None:
    def requests(weights: str = "w", **settings: Any) -> int:
        with PlantedServer(encoder, right) as server:
            where = settings.pop("data", data)
            record = measure(
                server, suite_of(where, **settings), tmp_path / "out", model, weights=weights, cache=tmp_path / "cache"
            )
            assert (record.status, record.score) == ("ok", 100)
            return len(server.seeds)

    other = write_jsonl(tmp_path / "other.jsonl", arena_rows([*ANSWERS[:-1], "129.0"]))
    assert requests() == 60
    assert requests() == 0
    assert requests(n=3) == 30
    assert requests(k=(1, 2)) == 0  # another record, of the same responses
    assert requests(weights="v") == 60
    assert requests(weights="") == 60  # nobody knows whether they are the same
    assert requests(weights="") == 60
    assert requests(temperature=0.5) == 60
    assert requests(max_tokens=199) == 60
    assert requests(seed=1) == 60
    assert requests(limit=3) == 6
    assert requests(data=other) == 60


# What has no score


def failed(record: BenchmarkScore) -> str:
    assert (record.status, record.score, record.stderr) == ("failed", None, None)
    return record.reason


def test_a_request_that_fails_is_a_failed_row_and_its_other_responses_are_kept(
    model: Path, encoder: Encoder, data: Path, tmp_path: Path
) -> None:
    suite, given = suite_of(data, concurrency=1), {"weights": "w", "cache": tmp_path / "cache"}
    with PlantedServer(encoder, right, lambda n: "wrong_ids" if n >= 20 else None) as server:
        assert "is refused: " in failed(measure(server, suite, tmp_path / "out", model, **given))
    with PlantedServer(encoder, right) as server:
        assert measure(server, suite, tmp_path / "out", model, **given).score == 100
        assert len(server.seeds) == 40


def test_a_server_that_does_not_answer_in_time_is_a_failed_row(
    model: Path, encoder: Encoder, data: Path, tmp_path: Path
) -> None:
    with PlantedServer(encoder, right, lambda n: "hang" if n >= 20 else None) as server:
        reason = failed(measure(server, suite_of(data, timeout=3), tmp_path, model))
    assert reason.startswith(("not finished after 3 s (`timeout` of the suite)", "a request failed: "))


def test_a_server_that_comes_back_with_other_weights_is_a_failed_row(
    model: Path, encoder: Encoder, data: Path, tmp_path: Path
) -> None:
    def restarted(prompt: str, seed: int) -> str:
        server.fake.version = "step-7" if len(server.fake.requests) < 30 else "default"
        return right(prompt, seed)

    given = {"weights": "w", "cache": tmp_path / "cache"}
    with PlantedServer(encoder, restarted) as server:
        reason = failed(measure(server, suite_of(data, concurrency=1), tmp_path / "out", model, **given))
    assert reason == "weights 'default' and 'step-7' answered: the engine was started again, or updated"
    [file] = (tmp_path / "cache" / "responses").iterdir()
    assert len(file.read_bytes().splitlines()) == 1 + 29  # none of the other weights is kept


def test_responses_of_weights_that_are_not_meant_are_never_kept(
    model: Path, encoder: Encoder, data: Path, tmp_path: Path
) -> None:
    given = {"weights": "w", "cache": tmp_path / "cache", "objection": lambda: "the engine has died"}
    with PlantedServer(encoder, right) as server:
        assert failed(measure(server, suite_of(data), tmp_path / "out", model, **given)) == "the engine has died"
    [file] = (tmp_path / "cache" / "responses").iterdir()
    assert len(file.read_bytes().splitlines()) == 1


def test_a_server_that_cuts_earlier_than_the_row_says_is_a_failed_row(
    model: Path, encoder: Encoder, data: Path, tmp_path: Path
) -> None:
    class Short(PlantedServer):
        pass

    with Short(encoder, lambda prompt, seed: "x" * 300) as server:
        sample = server.fake._sample
        server.fake._sample = lambda i, start, images, settings: sample(  # type: ignore[method-assign]
            i, start, images, {**settings, "max_tokens": 50}
        )
        reason = failed(measure(server, suite_of(data), tmp_path, model))
    assert "after 50 tokens, and max_tokens is 200: max_model_len of the engine is too small" in reason


def test_a_model_that_is_served_elsewhere_has_no_chat_template_here(
    encoder: Encoder, data: Path, tmp_path: Path
) -> None:
    with PlantedServer(encoder, right) as server:
        assert "it is served elsewhere" in failed(measure(server, suite_of(data), tmp_path, None))
        assert server.seeds == []


def test_an_answer_of_a_megabyte_is_judged(model: Path, encoder: Encoder, data: Path, tmp_path: Path) -> None:
    def long(prompt: str, seed: int) -> str:
        return "1 " * 500_000 + right(prompt, seed)

    with PlantedServer(encoder, long) as server:
        record = measure(server, suite_of(data, n=1, limit=2, max_tokens=2_000_000), tmp_path, model)
    assert (record.status, record.score) == ("ok", 100.0)


PROBLEMS = [Problem("a", (), "1"), Problem("b", (), "2")]


def samples_of(*texts: str) -> list[Sample]:
    return [Sample("ab"[n % 2], n // 2, n, text, 1, "stop") for n, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("verdicts", "n", "reason"),
    [
        ([True, None, False, True], 2, "1 of 4 verdicts are unknown; response 0 to problem b: why"),
        ([True, True, False], 2, "problem b has 1 responses, and n is 2"),
        ([True, True, False, False], 1, "problem a has 2 responses, and n is 1"),
    ],
)
def test_an_incomplete_benchmark_has_no_score(verdicts: Sequence[bool | None], n: int, reason: str) -> None:
    samples = samples_of(*"xxxx"[: len(verdicts)])
    with pytest.raises(InvalidRunError, match=re.escape(reason)):
        score(PROBLEMS, samples, [Verdict(one, "why") for one in verdicts], n=n, ks=())


class Broken:
    version = "0"

    def __init__(self, verdicts: int | Exception) -> None:
        self.verdicts = verdicts

    def judge(self, problems: Sequence[Problem], samples: Sequence[Sample]) -> list[Verdict]:
        if isinstance(self.verdicts, Exception):
            raise self.verdicts
        return [Verdict(True)] * self.verdicts


@pytest.mark.parametrize(
    "verdicts", [RuntimeError("a verifier process did not start"), UserError("no sandbox"), OSError("no memory"), 1, 3]
)
def test_a_judge_that_cannot_work_is_a_failed_row(verdicts: int | Exception) -> None:
    with pytest.raises(InvalidRunError, match="the judge"):
        judge_all(PROBLEMS, samples_of("x", "y"), Broken(verdicts), opened=False)


# The judge of mathematics


def judged(answer: str, *texts: str) -> list[Verdict]:
    problem = Problem("p", (), answer)
    return MathVerify().judge([problem], [Sample("p", i, i, text, 1, "stop") for i, text in enumerate(texts)])


def test_math_verify_judges_as_in_its_own_project() -> None:
    verdicts = judged("\\frac{1}{576}", "\\boxed{1/576}", "\\boxed{\\dfrac{1}{576}}", "\\boxed{1/577}", "no idea", "")
    assert [verdict.right for verdict in verdicts] == [True, True, False, False, False]
    assert verdicts[3].reason == "no answer found"
    assert [v.right for v in judged("073", "so \\boxed{73}", "it is 73.", "\\boxed{74}")] == [True, True, False]
    assert [v.right for v in judged("2\\sqrt{3}", "\\boxed{\\sqrt{12}}")] == [True]


def test_an_answer_that_takes_too_long_is_wrong_by_math_verifys_own_limit_and_says_so() -> None:
    [verdict] = judged("42", "\\boxed{9^{9^{9}}}")
    assert verdict == Verdict(False, "Timeout during comparison")


def test_an_answer_key_that_is_not_understood_is_unknown() -> None:
    [verdict] = judged("", "\\boxed{1}")
    assert verdict.right is None
    assert "the answer of the problem is not understood" in verdict.reason


def test_a_judge_that_dies_or_hangs_gives_unknown_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "TASKS", "dying_judge")
    monkeypatch.setattr(mathematics, "TIMEOUT", 2.0)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    dead, hung, alive = judged("1", "die", "hang", "1")
    assert (dead, hung) == (Verdict(None, "verifier process died"), Verdict(None, "timeout"))
    assert alive == Verdict(True)


# Data and settings


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_a_parquet_file_is_read_as_the_same_rows(data: Path, tmp_path: Path) -> None:
    benchmark = known.find("hmmt_feb_2025")
    assert benchmark.problems(table(tmp_path / "rows.parquet", arena_rows(ANSWERS))) == benchmark.problems(data)


def cut_off(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-40])
    return path


ROWS = arena_rows(ANSWERS)
BAD = {
    "missing.jsonl": (lambda path: path, "no such file; it is the `data` of a benchmark"),
    "few.jsonl": (lambda path: write_jsonl(path, ROWS[:25]), "25 rows, and the benchmark has 30"),
    "cut.jsonl": (lambda path: cut_off(write_jsonl(path, ROWS)), "line 30 is not JSON"),
    "cut.parquet": (lambda path: cut_off(table(path, ROWS)), "not a complete parquet file"),
    "other.jsonl": (
        lambda path: write_jsonl(path, [{"question": "?", "answer": 1}] * 30),
        "row 1: no column 'problem_idx'; there is question, answer",
    ),
    "types.jsonl": (
        lambda path: write_jsonl(path, [*ROWS[:-1], {**ROWS[-1], "answer": None}]),
        "row 30: answer: expected int or str, found nothing",
    ),
    "list.jsonl": (lambda path: write_jsonl(path, [[1]] * 30), "row 1: expected keys and values, found a list"),
    "twice.jsonl": (lambda path: write_jsonl(path, [*ROWS[:-1], ROWS[0]]), "2 problems have the key '1'"),
    "rows.csv": (lambda path: write_jsonl(path, ROWS), "is a .jsonl or .parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_data_that_is_not_the_benchmark_is_refused_before_anything_is_asked(
    name: str, model: Path, encoder: Encoder, tmp_path: Path
) -> None:
    make, message = BAD[name]
    path = make(tmp_path / name)
    with PlantedServer(encoder, right) as server:
        with pytest.raises(DataError, match=re.escape(message)) as error:
            measure(server, suite_of(path), tmp_path / "out", model)
        assert str(path) in str(error.value)
        assert server.seeds == []


def test_published_data_that_cannot_be_read_is_a_failed_row_that_says_what_to_do(
    model: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*given: object, **settings: object) -> None:
        raise ConnectionError("Couldn't reach 'MathArena/hmmt_feb_2025' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with PlantedServer(encoder, right) as server:
        reason = failed(measure(server, suite_of(None), tmp_path, model))
    assert reason == (
        "MathArena/hmmt_feb_2025 of the model hub: Couldn't reach 'MathArena/hmmt_feb_2025' on the Hub; "
        "or name a local file under `data`"
    )


def test_an_unknown_benchmark_is_refused(model: Path, encoder: Encoder, data: Path, tmp_path: Path) -> None:
    with (
        PlantedServer(encoder, right) as server,
        pytest.raises(ConfigError, match=r"HMMT: no sampled benchmark 'hmmt_2025'; did you mean 'hmmt_"),
    ):
        measure(server, suite_of(data, benchmark="hmmt_2025"), tmp_path, model)


@pytest.mark.parametrize("name", known.BENCHMARKS)
def test_every_known_benchmark_makes_problems_of_its_columns(name: str) -> None:
    benchmark = known.find(name)
    row = {column: "7" if str in types else 7 for column, types in benchmark.source.columns.items()}
    problem = benchmark.problem(row)
    assert problem is not None
    assert "boxed" in problem.messages[0]["content"]
    assert problem.reference == "7"


# The table


def test_pass_at_k_and_cut_responses_stand_below_the_table_and_in_the_csv() -> None:
    more = {"pass@8": 75.0, "pass@8_stderr": 4.0, "cut": 12.5}
    settings = {"responses": 8, "k": [8], "top_p": 1.0, "seed": 42}
    ok = BenchmarkScore(
        "m", "r", "AIME", "aime_2025", "pass@1", "ok", "", 50.0, 5.0, 30, "", "", settings, {}, 1.0, more=more
    )
    results = Results.of([Row("m", "base", (ok,))])
    assert "m, AIME: pass@8 75.0 ± 4.0, 12.5 % of the responses were cut" in results.markdown().splitlines()
    head, line = results.csv().splitlines()
    assert head.endswith("temperature,top_p,seed,responses,k,limit,reasoning_tags,more")
    assert line.endswith(',,1.0,42,8,[8],,,"{""pass@8"": 75.0, ""pass@8_stderr"": 4.0, ""cut"": 12.5}"')


def test_errors_of_pass_at_k_are_finite() -> None:
    found = score(PROBLEMS, samples_of("x", "y"), [Verdict(True), Verdict(False)], n=1, ks=(1,))
    assert found.more["pass@1"] == found.score == 50.0
    assert math.isfinite(found.more["pass@1_stderr"])
