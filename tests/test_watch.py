"""The page of `mmopd watch`: who may read it, what it sends, and that it survives every damage of a run folder."""

import json
import os
import re
import shutil
import socket
import time
from contextlib import closing
from itertools import product
from pathlib import Path

import pytest
from growing_run import DIES, KILLED, STEPS, grow
from run_folders import write_run
from starlette.testclient import TestClient
from test_report_damage import ANY, FILES, SPECIAL, Damage

from mmopd.errors import UserError
from mmopd.report.metrics import MetricsWriter
from mmopd.report.run_files import RunFiles
from mmopd.runtime import status
from mmopd.runtime.run_folder import RunFolder
from mmopd.watch import metrics as growing
from mmopd.watch.logs import faults, last_lines, log_names
from mmopd.watch.metrics import GrowingMetrics
from mmopd.watch.overlay import RUNS, names_of
from mmopd.watch.server import FILES as OF_PAGE
from mmopd.watch.server import application, listen

TOKEN = "secret"
OWN = ("status/launcher.json", "status/rank0.json", "status/newest.jsonl", "logs/rank0.log")  # read by no report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def client(*runs: Path, host: str = "127.0.0.1:8000") -> TestClient:
    return TestClient(application(runs, TOKEN), base_url=f"http://{host}", follow_redirects=False)


def state(http: TestClient, **asked: object) -> dict:  # type: ignore[type-arg]
    answer = http.get(f"/{TOKEN}/state", params=asked)
    assert answer.status_code == 200
    return answer.json()


# Who may read it.


@pytest.mark.parametrize(
    "path", ["/", "/state", f"/{TOKEN}x/", f"/x{TOKEN}/state", "//", "/watch.js", "/\udcff/", "/ü/"]
)
def test_without_the_token_nothing_is_shown(run: Path, path: str) -> None:
    answer = client(run).get(path.encode("utf-8", "surrogateescape").decode("latin-1"))
    assert answer.status_code == 403
    assert "Open the whole URL" in answer.text
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1]:8000", ""])
def test_another_name_of_the_host_is_refused(run: Path, host: str) -> None:
    answer = client(run).get(f"/{TOKEN}/state", headers={"Host": host})
    assert answer.status_code == 400
    assert "digests" not in answer.text


def test_the_page_is_there_under_both_names_of_this_machine_and_after_a_missing_slash(run: Path) -> None:
    for host in ("127.0.0.1:8000", "localhost:9"):
        page = client(run, host=host).get(f"/{TOKEN}/")
        assert page.status_code == 200
        assert page.headers["cache-control"] == "no-store"
    moved = client(run).get(f"/{TOKEN}")
    assert (moved.status_code, moved.headers["location"]) == (307, f"/{TOKEN}/")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_only_reads(run: Path, method: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    http = client(run)
    assert http.request(method, f"/{TOKEN}/state").status_code == 405
    state(http)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    "name", ["../recipe.yaml", "..%2frecipe.yaml", "%2e%2e/recipe.yaml", "recipe.yaml", "server.py"]
)
def test_no_other_file_is_sent(run: Path, name: str) -> None:
    assert client(run).get(f"/{TOKEN}/{name}").status_code in {403, 404}


def test_a_log_is_one_of_the_folder_and_no_link(run: Path, tmp_path: Path) -> None:
    (run / "logs").mkdir()
    (run / "logs" / "rank0.log").write_text("of rank 0\n", encoding="utf-8")
    (tmp_path / "outside.log").write_text("private\n", encoding="utf-8")
    (run / "logs" / "link.log").symlink_to(tmp_path / "outside.log")
    http = client(run)
    for name in ("../../outside.log", "link.log", str(tmp_path / "outside.log"), "../logs/rank0.log", "rank0.log\0"):
        parts = state(http, log=name)["parts"]
        assert parts["log"] == "of rank 0\n"
        assert "link.log" not in parts["log-names"]


def test_nothing_is_loaded_from_elsewhere_and_no_script_is_in_the_page(run: Path) -> None:
    http = client(run)
    page = http.get(f"/{TOKEN}/").text
    assert re.findall(r"<script(?![^>]* src=)", page) == []
    assert set(re.findall(r'(?:src|href)="([^"#][^"]*)"', page)) == {*OF_PAGE, "plotly.js", "data:,"}
    for name in (*OF_PAGE, "plotly.js"):
        answer = http.get(f"/{TOKEN}/{name}")
        assert answer.status_code == 200
        assert "nosniff" in answer.headers["x-content-type-options"]
    assert "default-src 'none'; script-src 'self';" in http.get(f"/{TOKEN}/").headers["content-security-policy"]


def test_text_of_a_model_is_escaped(run: Path) -> None:
    (run / "logs").mkdir()
    evil = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"
    (run / "logs" / "rank0.log").write_text(f"2026-12-01T05:20:02.906Z ERROR rank0 {evil}\n", encoding="utf-8")
    lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    told = json.dumps(lines[-1]).replace("What is their sum?", evil.replace("/", "\\\\/"))
    (run / "samples.jsonl").write_text("\n".join([*lines[:-1], json.loads(told)]) + "\n", encoding="utf-8")
    parts = state(client(run))["parts"]
    assert all("<script" not in part and "onerror=alert(1)>" not in part for part in parts.values())
    assert sum("&lt;script&gt;" in parts[name] for name in ("responses", "log", "faults")) == 3


def test_it_listens_on_loopback_and_names_a_port_that_is_taken() -> None:
    with listen(0) as listening:
        host, port = listening.getsockname()
        assert host == "127.0.0.1"
        with socket.create_connection((host, port)):
            pass
        with pytest.raises(UserError, match=rf"--port {port}: Address already in use; leave it out"):
            listen(port)


def test_folders_that_are_no_runs_and_too_many_runs_are_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        application([tmp_path / "none"], TOKEN)
    with pytest.raises(UserError, match=f"{RUNS + 1} runs: at most {RUNS}"):
        application([run] * (RUNS + 1), TOKEN)


# What it sends.


def test_parts_are_sent_when_they_have_changed(run: Path) -> None:
    http = client(run)
    first = state(http)
    assert {"now", "training", "responses", "results", "difficulty", "settings"} <= first["parts"].keys()
    assert first["data"]["curves"][0]["title"] == "Accuracy of the rollouts"
    assert 'alt="image of the prompt"' in first["parts"]["responses"]
    assert "step 19" in first["parts"]["responses"]
    assert "step 0 ·" not in first["parts"]["responses"]
    have = ",".join(first["digests"].values())
    again = state(http, have=have)
    assert (again["parts"], again["data"]) == ({}, None)
    with closing(MetricsWriter(run / "metrics.jsonl", 20)) as writer:
        writer.write(20, {"return": 1.0, "accuracy/digit_sum": 0.9})
    grown = state(http, have=have)
    assert "21 of 100 steps" in grown["parts"]["settings"]
    assert "responses" not in grown["parts"]
    assert grown["data"]["curves"][0]["x"][-1] == 20


def told(root: Path, process: str) -> object:
    """Return how far a process has said that it is."""
    status = json.loads((root / "status" / f"{process}.json").read_bytes())
    return status.get("done", status.get("doing"))


@pytest.fixture(scope="module")
def stages_of_growth(tmp_path_factory: pytest.TempPathFactory) -> dict[object, dict]:  # type: ignore[type-arg]
    """What the page says after some steps of a run, and after its end."""
    root = tmp_path_factory.mktemp("grown") / "run"
    said: dict[object, dict] = {}  # type: ignore[type-arg]
    http = None
    patch = pytest.MonkeyPatch()
    patch.setattr(status, "EVERY", 0.02)
    for step in grow(root, 0.0):
        http = http or client(root)
        if step in {0, DIES, STEPS - 1}:
            awaited = {"launcher": step + 1, "rank0": f"step {step}, rollout", "rank1": f"step {step}, rollout"}
            while any(told(root, name) != value for name, value in awaited.items()):
                time.sleep(0.01)
            said[step] = state(http)
    patch.undo()
    assert http is not None
    said["end"] = state(http)
    return said


def test_a_run_is_seen_from_its_first_step_to_its_last(stages_of_growth: dict) -> None:  # type: ignore[type-arg]
    for step in (0, DIES, STEPS - 1):
        said = stages_of_growth[step]
        assert said["data"]["curves"][0]["x"] == list(range(step + 1))
        assert f"in step {step}?" in said["parts"]["responses"]
        assert f"{step + 1} of {STEPS}" in said["parts"]["now"]
        assert "distil" in said["parts"]["now"]
    assert "finished" in stages_of_growth["end"]["parts"]["now"]
    assert "stopped" in stages_of_growth["end"]["parts"]["processes"]


def test_a_server_that_dies_is_seen(stages_of_growth: dict) -> None:  # type: ignore[type-arg]
    assert "ended with status" not in stages_of_growth[0]["parts"]["processes"]
    assert stages_of_growth[0]["parts"]["faults"].strip() == ""
    said = stages_of_growth[DIES]["parts"]
    assert "ended with status -9, started again" in said["processes"]
    assert f"server {KILLED} ended with status -9 and is being restarted" in said["faults"]
    assert "3 requests to teachers failed (connection)" in said["faults"]


def test_queue_and_latency_of_a_teacher_are_summed_over_the_ranks(stages_of_growth: dict) -> None:  # type: ignore[type-arg]
    said = re.sub(r"<[^>]*>|\s+", " ", stages_of_growth[0]["parts"]["processes"])
    said = re.sub(r"\s+", " ", said)
    assert "image_teacher.0 answering in flight 6 queue 10 median 40 ms 95 % 40 ms answers 32 failed 0" in said
    assert "rank0 step 0, rollout" in said


def test_several_runs_are_drawn_over_each_other(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other")
    http = client(run, other)
    said = state(http, run=1)
    assert said["name"] == "other"
    charts = said["data"]["curves"]
    assert all([s["name"] for s in chart["series"]] == ["run", "other"] for chart in charts)
    assert "Accuracy of the rollouts: digit_sum" in {chart["title"] for chart in charts}
    assert said["parts"]["runs"].count("<button") == 2
    assert state(http, run="9")["name"] == "run"
    assert names_of(["/a/run", "/b/run", "/c/other/"]) == ["/a/run", "/b/run", "other"]


def test_a_launcher_that_was_killed_is_seen(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmopd.watch.status.SILENT", 0.0)
    with status.telling(run / "status" / "launcher.json", lambda: {"stage": "distil"}):
        said = state(client(run))["parts"]["now"]
    assert "no sign of life for" in said


def test_a_run_that_failed_says_why(run: Path) -> None:
    with (
        pytest.raises(UserError),
        status.telling(run / "status" / "launcher.json", lambda: {"stage": "distil"}),
    ):
        raise UserError("rank1 ended with status 3; its <error>")
    said = state(client(run))["parts"]["now"]
    assert "ended early" in said
    assert "rank1 ended with status 3; its &lt;error&gt;" in said


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "status").write_text("in the way", encoding="utf-8")
    with status.telling(tmp_path / "status" / "launcher.json", dict):
        pass
    assert len([r for r in caplog.records if "cannot be written" in r.getMessage()]) == 1


# Bounds and damages.


def test_a_long_run_is_read_in_pieces_and_evenly_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "MOST", 100)
    monkeypatch.setattr(growing, "CHUNK", 1000)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}, "loss": {i}}}\n' for i in range(1000)) + '{"step": 10', encoding="utf-8")
    reader = GrowingMetrics(RunFolder(tmp_path))
    for _ in range(40):
        rows = reader.read()
    steps = [row["step"] for row in rows]
    assert len(steps) <= 100
    assert steps[-growing.RECENT :] == list(range(1000 - growing.RECENT, 1000))
    assert {step % 16 for step in steps[: -growing.RECENT]} == {0}
    assert len(reader.left_out) == 0
    with path.open("a", encoding="utf-8") as file:
        file.write("00}\n" + "x" * 3000 + "\n")
    for _ in range(9):
        rows = reader.read()
    assert rows[-1]["step"] == 1000
    assert "without the end of a line" in str(list(reader.left_out))


def test_a_resume_that_removes_steps_is_followed(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path / "metrics.jsonl", 0)) as writer:
        for step in range(9):
            writer.write(step, {"loss": 1.0})
    reader = GrowingMetrics(RunFolder(tmp_path))
    assert len(reader.read()) == 9
    with closing(MetricsWriter(tmp_path / "metrics.jsonl", 4)) as writer:
        writer.write(4, {"loss": 2.0})
    assert [row["loss"] for row in reader.read()] == [1.0] * 4 + [2.0]


def test_of_a_log_the_end_is_read_without_control_codes(tmp_path: Path) -> None:
    path = tmp_path / "rank0.log"
    path.write_bytes(b"x" * 10**6 + b"\n0 %\r50 %\r100 %\n\x1b[31mred\x1b[0m\x07 \xff\n" + b"2026-12-01T05:20:02.906Z ")
    with path.open("ab") as file:
        file.write(
            b"ERROR rank0 Traceback (most recent call last):\n2026-12-01T05:20:02.906Z ERROR rank0 KeyError\nend"
        )
    lines = last_lines(path)
    assert [line for _, line in lines][:2] == ["100 %", "red �"]
    assert [level for level, _ in lines] == ["", "", "error", "error", ""]
    assert [(fault.process, fault.text.splitlines()[-1]) for fault in faults(tmp_path)] == [("rank0", "KeyError")]


@pytest.mark.parametrize(("file", "kind"), [*product(OWN, ANY), *product(FILES, ("garbage", "a pipe", "UTF-16"))])
def test_a_file_that_is_no_longer_what_it_was_leaves_the_rest(run: Path, file: str, kind: str) -> None:
    for name in ("launcher.json", "rank0.json"):
        with status.telling(run / "status" / name, lambda: {"doing": "step 0"}):
            pass
    shutil.copy(run / "samples.jsonl", run / "status" / "newest.jsonl")
    (run / "logs").mkdir()
    (run / "logs" / "rank0.log").write_text("one line\n", encoding="utf-8")
    http = client(run)
    before = state(http)
    ANY[kind][0](run / file)
    after = state(http)
    assert after["parts"].keys() == before["parts"].keys()
    if file.endswith((".json", ".yaml")) and not file.startswith("status/newest"):
        assert file in after["parts"]["left-out"]
    shown = {"metrics.jsonl": "training", "samples.jsonl": "responses", "results.json": "results"}
    kept = {"training", "results", "difficulty"} - {shown.get(file), "difficulty" if "difficulty" in file else None}
    assert all(after["parts"][name].strip() for name in kept)


def test_newest_responses_that_were_replaced_meanwhile_are_no_damage(run: Path) -> None:
    files = RunFiles(RunFolder(run))
    newest = files.run.newest
    newest.parent.mkdir(exist_ok=True)
    shutil.copy(run / "samples.jsonl", newest)
    responses = files.responses(100, newest)
    pictures = [files.images(response) for response in responses]
    assert any(pictures)
    lines = newest.read_text(encoding="utf-8").splitlines()
    for later in (["", *lines], [line.replace('"step": ', '"step": 9') for line in lines]):
        newest.write_text("\n".join(later) + "\n", encoding="utf-8")
        assert not any(files.images(response) for response in responses)
    assert not list(files.left_out)


@pytest.mark.parametrize(("file", "damage", "said"), SPECIAL, ids=[f"{i}-{s[0]}" for i, s in enumerate(SPECIAL)])
def test_a_damaged_file_is_named(run: Path, file: str, damage: Damage, said: str) -> None:
    damage(run / file)
    parts = state(client(run))["parts"]
    in_progress = {"metrics.jsonl": ("not in the order", "repeat a step", "no finite", "cut short")}.get(file, ())
    if said and not said.startswith(in_progress) and not any(part in said for part in in_progress):
        assert file in parts["left-out"]


def test_an_empty_folder_of_a_run_that_begins_is_shown(tmp_path: Path) -> None:
    (tmp_path / "status").mkdir()
    said = state(client(tmp_path))
    assert "no launcher has told what it does" in said["parts"]["now"]
    assert said["data"] == {"curves": [], "difficulty": [], "marks": []}


def test_pipes_and_folders_among_the_logs_are_left_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rank0.log")
    (tmp_path / "rank1.log").mkdir()
    (tmp_path / "launcher.log").write_text("", encoding="utf-8")
    assert log_names(tmp_path) == ["launcher.log"]
