"""A run that goes on refuses other teachers under the same names, unless the change is on purpose."""

import dataclasses
import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from run_folders import write_run
from safetensors.numpy import save_file

from mmopd.commands.job import Job
from mmopd.commands.teachers import check_teachers
from mmopd.config import Fleet, Recipe, Student
from mmopd.errors import CheckpointError, ConfigError, ServerError, UserError
from mmopd.passes.answers import find_answers
from mmopd.report.html import write_report
from mmopd.report.model_card import _changes
from mmopd.runtime.fingerprint import END, Fingerprint, sample_weights
from mmopd.runtime.run_folder import RunFolder
from mmopd.serving import endpoint
from mmopd.serving.endpoint import Endpoint
from mmopd.teacher import identity
from mmopd.teacher.fleet import from_files

ADD, SUM = ("add", "text"), ("sum", "text")


def model(folder: Path, seed: int = 0, **files: str) -> Path:
    """Write a small model; other seeds have other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = np.random.default_rng(seed).normal(size=(40, 64)).astype(np.float32)
    save_file({"head.weight": weights, "norm.weight": np.ones(64, np.float32)}, folder / "model.safetensors")
    for name, text in {"config.json": "{}", "tokenizer.json": '{"a": 1}', **files}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def adapter(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}', encoding="utf-8")
    a, b = (np.random.default_rng(seed).normal(size=size).astype(np.float32) for size in ((2, 8), (8, 2)))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file({f"{name}A.weight": a, f"{name}B.weight": b}, folder / "adapter_model.safetensors")
    return folder


def job(
    teachers: Mapping[str, Any],
    routes: list[Mapping[str, Any]] | None = None,
    kinds: tuple[tuple[str, str], ...] = (ADD,),
    **more: Any,
) -> Job:
    fleet = Fleet.model_validate({"teachers": teachers, "routes": routes or [{"teacher": next(iter(teachers))}]})
    objective = {"objective": {"kind": more.pop("kind", "opd")}}
    recipe = Recipe.model_validate(
        {"student": Student(model=Path("m")), "fleet": "f", "mixture": "d", "algorithm": objective}
    )
    return Job(recipe, fleet, None, {"s": SimpleNamespace(kinds=kinds)}, None, **more)  # type: ignore[dict-item]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    return folder


def checkpoint(run: RunFolder, step: int) -> None:
    """Write a checkpoint as a rank does, without weights."""
    record = identity.load(run.teachers)
    state = {"step": step, "ranks": 1, "score": None, "teachers": record and dataclasses.asdict(record), "caller": {}}
    folder = run.checkpoints / f"step-{step:08d}"
    folder.mkdir(exist_ok=True)
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    size = (folder / "state.json").stat().st_size
    (folder / "manifest.json").write_text(json.dumps({"state.json": [size, ""]}), encoding="utf-8")


def score(run: RunFolder) -> None:
    run.scores.mkdir(exist_ok=True)
    (run.scores / "scores-0.bin").write_bytes(b"of the teacher before")


def resume(run: RunFolder, job: Job, *changed: str) -> str:
    """Check the teachers as `mmopd train --resume` does, and return what it says."""
    out = io.StringIO()
    check_teachers(job, run, changed, Console(file=out, width=1000))
    return out.getvalue()


def test_the_same_teacher_goes_on_and_its_scores_are_kept_wherever_its_folder_is(
    run: RunFolder, tmp_path: Path
) -> None:
    assert resume(run, job({"t": {"model": model(tmp_path / "a")}})) == ""
    checkpoint(run, 4)
    score(run)
    assert resume(run, job({"t": {"model": model(tmp_path / "b")}})) == ""
    assert (run.scores / "scores-0.bin").is_file()
    assert identity.known(run.teachers)["t"].model == str(tmp_path / "b")


CHANGES: dict[str, tuple[Mapping[str, Any], str]] = {
    "weights": ({"seed": 1}, "weights ("),
    "configuration": ({"config.json": '{"scale": 2}'}, "weights ("),
    "tokenizer": ({"tokenizer.json": '{"a": 2}'}, "tokenizer ("),
    "chat template": ({"chat_template.jinja": "{{ messages }}"}, "tokenizer ("),
    "view": ({"view": "blank"}, "its view of add/text"),
    "adapter": ({"adapter": True}, "adapter (none before, "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_teacher_under_the_same_name_is_refused_until_it_is_said(
    run: RunFolder, tmp_path: Path, change: str
) -> None:
    folder = tmp_path / "t"
    resume(run, job({"t": {"model": model(folder)}}))
    checkpoint(run, 4)
    score(run)
    how, said = CHANGES[change]
    settings = {"model": model(folder, how.get("seed", 0), **{k: v for k, v in how.items() if "." in k})}
    settings |= {"view": how["view"]} if "view" in how else {}
    settings |= {"adapter": adapter(tmp_path / "lora")} if "adapter" in how else {}
    with pytest.raises(CheckpointError, match=r"not those that it has learnt from") as error:
        resume(run, job({"t": settings}))
    assert f"  t: {said}" in str(error.value)
    assert f"`mmopd train --resume {run.root} --changed-teacher t`" in str(error.value)
    assert (run.scores / "scores-0.bin").is_file()
    output = resume(run, job({"t": settings}), "t")
    assert f"teacher t is another one from step 4 on: {said}" in output
    assert not run.scores.exists()
    record = identity.load(run.teachers)
    assert record is not None
    (changed,) = record.changed
    assert (changed.teacher, changed.step, changed.what[0].startswith(said)) == ("t", 4, True)
    assert resume(run, job({"t": settings})) == ""  # it is the run's teacher from now on


def test_a_name_that_did_not_change_is_told_and_an_unknown_one_refused(run: RunFolder, tmp_path: Path) -> None:
    one = job({"math": {"model": model(tmp_path / "t")}})
    assert "--changed-teacher math: nothing has changed" in resume(run, one, "math")
    checkpoint(run, 2)
    assert "--changed-teacher math: nothing has changed" in resume(run, one, "math")
    with pytest.raises(ConfigError, match="--changed-teacher maths: the run has no such teacher; did you mean 'math'"):
        resume(run, one, "maths")


def test_a_teacher_may_change_before_anything_was_learnt_and_its_scores_go(run: RunFolder, tmp_path: Path) -> None:
    resume(run, job({"t": {"model": model(tmp_path / "a")}}))
    score(run)
    assert "t is another one than at the start" in resume(run, job({"t": {"model": model(tmp_path / "b", 1)}}))
    assert not run.scores.exists()


def test_the_newest_checkpoint_tells_the_teachers_of_a_run_without_a_record(run: RunFolder, tmp_path: Path) -> None:
    resume(run, job({"t": {"model": model(tmp_path / "a")}}))
    checkpoint(run, 4)
    run.teachers.unlink()
    assert resume(run, job({"t": {"model": tmp_path / "a"}})) == ""
    run.teachers.unlink()
    with pytest.raises(CheckpointError, match="weights"):
        resume(run, job({"t": {"model": model(tmp_path / "b", 1)}}))


def test_a_run_of_an_earlier_version_has_no_record_and_its_scores_go(run: RunFolder, tmp_path: Path) -> None:
    checkpoint(run, 4)
    score(run)
    assert "no record of its teachers before step 4" in resume(run, job({"t": {"model": model(tmp_path / "a")}}))
    assert not run.scores.exists()


def test_a_checkpoint_that_is_left_out_is_named_and_a_change_is_not_later_than_the_run(
    run: RunFolder, tmp_path: Path
) -> None:
    one = job({"t": {"model": model(tmp_path / "a")}})
    other = job({"t": {"model": model(tmp_path / "b", 1)}})
    resume(run, one)
    checkpoint(run, 2)
    checkpoint(run, 4)
    resume(run, other, "t")
    (run.checkpoints / "step-00000004" / "manifest.json").write_text("[]", encoding="utf-8")
    said = resume(run, other)
    assert "step-00000004 is left out, and the run goes on from step 2" in said
    assert "manifest.json: missing or unreadable" in said
    record = identity.load(run.teachers)
    assert record is not None
    assert [change.step for change in record.changed] == [2]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"teachers": {"t": 1}}', "\x80"])
def test_a_damaged_record_is_named(run: RunFolder, tmp_path: Path, text: str) -> None:
    run.teachers.write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"teachers\.json: damaged .*; delete it"):
        resume(run, job({"t": {"model": model(tmp_path / "a")}}))


def test_teachers_of_prompts_that_the_run_had_must_stay_and_those_of_new_prompts_may_come(
    run: RunFolder, tmp_path: Path
) -> None:
    two = {name: {"model": model(tmp_path / name, i)} for i, name in enumerate("ab")}
    resume(run, job(two, [{"teacher": "a"}]))
    checkpoint(run, 4)
    by_task = [{"task": "sum", "teacher": "b"}, {"teacher": "a"}]
    assert resume(run, job(two, by_task, (ADD, SUM))) == ""  # a source was added, with a teacher of its own
    assert resume(run, job(two, by_task, (ADD,))) == ""  # and is removed again
    swapped = job(two, [{"task": "add", "teacher": "b"}, {"teacher": "a"}], (ADD,))
    with pytest.raises(CheckpointError) as error:
        resume(run, swapped, "a")
    assert "b: it did not score add/text before" in str(error.value)
    assert "--changed-teacher a --changed-teacher b" in str(error.value)
    said = resume(run, swapped, "a", "b")
    assert "teacher a is another one from step 4 on: it no longer scores add/text" in said


def test_a_reference_is_a_teacher_too(run: RunFolder, tmp_path: Path) -> None:
    def with_reference(seed: int) -> Job:
        one = job({"t": {"model": model(tmp_path / "t")}, "before": {"model": model(tmp_path / "before", seed)}})
        routes = one.fleet.routes[0].model_copy(update={"teacher": "before"})
        return dataclasses.replace(one, references=one.fleet.model_copy(update={"routes": (routes,)}))

    resume(run, with_reference(1))
    assert set(identity.known(run.teachers)["before"].views) == {"add/text as reference"}
    checkpoint(run, 4)
    with pytest.raises(CheckpointError, match="before: weights"):
        resume(run, with_reference(2))


def test_an_extrapolated_student_is_merged_again_from_other_teachers(run: RunFolder, tmp_path: Path) -> None:
    for seed, left in ((0, False), (0, True), (1, False)):
        run.export.mkdir(exist_ok=True)
        resume(run, job({"t": {"model": model(tmp_path / "t", seed)}}, kind="expo"))
        assert run.export.exists() == left


@contextmanager
def serving(models: Any) -> Iterator[str]:
    """Answer /v1/models; yield the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"object": "list", "data": models}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_elsewhere_is_known_by_the_name_and_path_of_its_model(run: RunFolder) -> None:
    with serving([{"id": "wise", "root": "/models/wise-7b"}]) as url:
        resume(run, job({"t": {"endpoints": [url, f"{url}/v1"]}}))
        checkpoint(run, 4)
        first = identity.known(run.teachers)["t"]
        assert first.fingerprint == Fingerprint("wise (/models/wise-7b)")
    with serving([{"id": "wise", "root": "/models/wise-7b"}]) as url:
        assert resume(run, job({"t": {"endpoints": [url]}})) == ""  # another job, another port
    with serving([{"id": "wise", "root": "/models/wise-8b"}]) as url:
        with pytest.raises(CheckpointError, match=r"\(wise \(/models/wise-7b\) before, wise \(/models/wise-8b\) now\)"):
            resume(run, job({"t": {"endpoints": [url]}}))
        assert "from step 4 on" in resume(run, job({"t": {"endpoints": [url]}}), "t")
    with pytest.raises(ServerError, match=r"teacher t\.0: .* does not answer as a vLLM server"):
        resume(run, job({"t": {"endpoints": [url]}}))


def test_a_teacher_of_mmopd_serve_is_known_by_its_weights_here_and_there(run: RunFolder, tmp_path: Path) -> None:
    teachers = {"t": {"model": model(tmp_path / "t")}}
    resume(run, job(teachers))
    checkpoint(run, 4)
    here = identity.known(run.teachers)["t"].fingerprint
    fleet = Fleet.model_validate({"teachers": {"t": {"model": "not/here"}}, "routes": [{"teacher": "t"}]})
    with serving([{"id": "t.0", "root": "/t"}, {"id": "t.1", "root": "/t"}]) as url:
        for fingerprint, refused in ((here, False), (dataclasses.replace(here, weights="other"), True)):
            file = tmp_path / "endpoints.json"
            endpoint.save(file, [Endpoint(n, url, n, "", "teacher", "", fingerprint) for n in ("t.0", "t.1")])
            there = job({"t": {"model": "not/here"}}, elsewhere=from_files(fleet, [file]))
            if refused:
                with pytest.raises(CheckpointError, match="other now"):
                    resume(run, there)
            else:
                assert resume(run, there) == ""


def test_answers_of_other_teachers_are_kept_apart(run: RunFolder, tmp_path: Path) -> None:
    def file(teachers: Mapping[str, Any]) -> Path:
        one = job(teachers, kind="sft")
        resume(run, one)
        shards = SimpleNamespace(kinds=[ADD], fingerprint="data", folder=tmp_path)
        settings = {"rollout": one.recipe.rollout, "algorithm": one.recipe.algorithm}
        found = find_answers(
            {"s": shards},  # type: ignore[dict-item]
            fleet=one.fleet,
            identities=identity.known(run.teachers),
            **settings,
        )
        return found["s"][0]

    with serving([{"id": "wise", "root": "/a"}]) as a, serving([{"id": "wise", "root": "/b"}]) as b:
        files = [file({"t": {"endpoints": [url]}}) for url in (a, b)]
    with serving([{"id": "wise", "root": "/a"}]) as again:  # it may be another model of the same name
        files += [file({"t": {"endpoints": [again]}})]
    files += [file({"t": {"model": model(tmp_path / "t", seed)}}) for seed in (0, 1)]
    assert len(set(files)) == 5
    assert file({"t": {"model": model(tmp_path / "moved", 1)}}) == files[-1]


def test_a_hash_of_weights_reads_both_ends_of_each_tensor(tmp_path: Path) -> None:
    weights = np.zeros((3, END), np.float32)
    seen = set()
    for row, column in ((0, 0), (2, END - 1)):
        changed = weights.copy()
        changed[row, column] = 1
        save_file({"w": weights, "v": changed, "empty": np.zeros((0, 2), np.float32)}, tmp_path / "model.safetensors")
        seen.add(sample_weights(tmp_path))
        save_file({"w": changed, "v": weights, "empty": np.zeros((0, 2), np.float32)}, tmp_path / "model.safetensors")
        seen.add(sample_weights(tmp_path))
    assert len(seen) == 4
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(UserError, match=r"model\.safetensors: not a safetensors file, or not whole"):
        sample_weights(tmp_path)


def test_report_and_model_card_show_the_change_at_its_step(tmp_path: Path) -> None:
    run = RunFolder(write_run(tmp_path / "run"))
    page = write_report(run.root).read_text(encoding="utf-8")
    assert "Teacher image_teacher is another one from step 12 on: weights (a before, b now)." in page
    assert '"marks":[12]' in page
    assert "At a dotted line from top to bottom the run went on with another teacher." in page
    assert _changes(run, None) == "- **image_teacher** was another one before step 12: weights (a before, b now)"
    assert _changes(run, 12) == ""
    run.teachers.unlink()
    assert _changes(run, None) == ""
    assert "another one" not in write_report(run.root).read_text(encoding="utf-8")
