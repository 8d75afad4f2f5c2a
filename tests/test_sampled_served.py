"""A suite of both kinds of rows against a real vLLM server, whose model has sampling defaults of its own."""

import json
import shutil
from pathlib import Path

import pytest
from answering_server import write_rows
from sampled_server import arena_rows, write_jsonl

from mmopd.catalog import shipped
from mmopd.config import Engine
from mmopd.evaluate import evaluate, read_suite
from mmopd.evaluate.served import Served
from mmopd.runtime.fingerprint import hash_model
from mmopd.runtime.processes import Children
from mmopd.serving.servers import serve
from mmopd.serving.specs import ServerSpec

ENGINE = Engine(dtype="float32", max_model_len=512, max_num_seqs=8, kv_cache_mib=32)
DEFAULTS = {"top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0, "max_new_tokens": 3}


@pytest.mark.usefixtures("server")
def test_a_suite_of_both_kinds_is_measured_without_the_defaults_of_the_model(model: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(model, student)
    settings = json.loads((student / "generation_config.json").read_text(encoding="utf-8"))
    (student / "generation_config.json").write_text(json.dumps({**settings, **DEFAULTS}), encoding="utf-8")
    additions = shipped() / "eval" / "tasks" / "demo_additions.yaml"
    write_rows(tmp_path / "sums.parquet", ["What is 10+20?", "What is 11+21?"], ["30", "32"])
    write_jsonl(tmp_path / "hmmt.jsonl", arena_rows(range(30)))
    (tmp_path / "both.yaml").write_text(
        "benchmarks:\n"
        f"- {{column: Sums, task: {additions}, metric: 'accuracy,none', data: sums.parquet, max_tokens: 8}}\n"
        "- {runner: sampled, column: HMMT, benchmark: hmmt_feb_2025, data: hmmt.jsonl, n: 4, k: [2], limit: 2, "
        "max_tokens: 16}\n",
        encoding="utf-8",
    )
    suite = read_suite(tmp_path / "both.yaml", tmp_path)
    spec = ServerSpec("student", student, ENGINE, updatable=False)
    with Children() as children, serve([spec], children, tmp_path, lambda *event: None) as servers:
        weights = hash_model(student)
        given = {"model": student, "weights": weights, "served": Served.of(student, ENGINE), "cache": tmp_path / "c"}
        first = evaluate(servers["student"], suite, out=tmp_path / "out", **given)
        again = evaluate(servers["student"], suite, out=tmp_path / "again", **{**given, "cache": tmp_path / "d"})
    assert [(r.column, r.status, r.reason) for r in first] == [("Sums", "ok", ""), ("HMMT", "ok", "")]
    assert first[1].n == 2
    assert first[1].settings["family"] == "qwen3_vl"
    lines = [(out / "student/HMMT/samples.jsonl").read_text("utf-8") for out in (tmp_path / "out", tmp_path / "again")]
    samples = [json.loads(line) for line in lines[0].splitlines()]
    assert len(samples) == 8
    assert len({sample["seed"] for sample in samples}) == 8
    for key in ("1", "2"):  # with top_k 1 and a low temperature all four would be the same
        assert len({sample["text"] for sample in samples if sample["key"] == key}) == 4
    assert {sample["tokens"] for sample in samples if sample["finish"] == "length"} == {16}  # and not 3
    assert [r.score for r in again] == [r.score for r in first]
