"""Loggers: what they send, where they go on after a resume, and that a logger that fails or hangs stops no run.

Services whose package is not installed are left out, and pytest says so; docs/training.md says which were run.
"""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
from PIL import Image
from rich.console import Console
from run_folders import record_of, row
from typer.testing import CliRunner

from mmopd.cli import app
from mmopd.config import Recipe, Student
from mmopd.config.recipe import LoggerName
from mmopd.errors import ConfigError
from mmopd.evaluate import Results, Row
from mmopd.report import heatmap
from mmopd.report.heatmap import as_json
from mmopd.report.html import write_report
from mmopd.report.loggers import follow, start, state
from mmopd.report.loggers.base import Logger, picture_of
from mmopd.report.loggers.follow import Follower
from mmopd.report.loggers.registry import LOGGERS
from mmopd.report.metrics import JsonLines, MetricsWriter
from mmopd.runtime.run_folder import RunFolder

SERVICES = [name for name in LOGGERS if name != "tensorboard"]
RESULTS = Results.of([Row("base", "base", (record_of("base", 25.0),))])


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Return the folder of a run that has not begun."""
    folder = RunFolder(tmp_path / "a run")
    folder.create(Recipe(student=Student(model=Path("m")), fleet=Path("f"), mixture=Path("m"), seed=7))
    (folder.root / state.FOLDER).mkdir()
    return folder


@pytest.fixture(autouse=True)
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the services on this machine and in the test's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def write(run: RunFolder, steps: range, times: float = 1.0, samples: tuple[int, ...] = ()) -> None:
    """Write steps as the recorder does, after what a resume would remove is removed."""
    metrics = MetricsWriter(run.metrics, steps.start)
    lines = JsonLines(run.samples, steps.start)
    for step in steps:
        if step in samples:
            lines.append(as_json(row(step)))
            lines.append(as_json(row(step, "additions", images=[])))
        metrics.write(step, {"loss": times * step, "accuracy/digit_sum": 0.5, "grad_norm": float("nan")})
    metrics.close()
    lines.close()


def send(name: str, run: RunFolder, kind: type[Logger] | None = None) -> Follower:
    """Send what is written to a logger, in this process, and end it."""
    follower = Follower(kind or LOGGERS[name], run.root, run.root / state.FOLDER / f"{name}.json")
    stop = threading.Event()
    stop.set()
    follower.follow(stop)
    return follower


def test_each_name_of_the_setting_is_a_logger() -> None:
    assert set(get_args(LoggerName)) == LOGGERS.keys()


# TensorBoard.


def board(run: RunFolder) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.root / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_has_the_metrics_the_settings_the_samples_and_the_results(run: RunFolder) -> None:
    write(run, range(2), samples=(1,))
    RESULTS.write(run.root)
    send("tensorboard", run)
    found = board(run)
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(0, 0.0), (1, 1.0)]
    assert sorted(found.Tags()["scalars"]) == ["accuracy/digit_sum", "loss"]  # a value that is not finite is left out
    texts = {tag: found.Tensors(f"{tag}")[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert "| seed | 7 |" in texts["recipe"]
    assert "3+5=8" in texts["samples"]
    assert "25.0" in texts["results"]
    [image] = found.Images("samples/0 digit_sum")
    assert (image.step, image.width, image.height) == (1, 64, 32)


def test_after_a_resume_tensorboard_has_each_step_once_as_it_was_computed_last(run: RunFolder) -> None:
    write(run, range(4))
    send("tensorboard", run)
    write(run, range(2, 5), times=10.0)
    send("tensorboard", run)
    assert [(e.step, e.value) for e in board(run).Scalars("loss")] == [(0, 0), (1, 1), (2, 20), (3, 30), (4, 40)]


def test_steps_that_a_resume_removes_while_the_logger_runs_are_replaced(run: RunFolder) -> None:
    write(run, range(4))
    follower = Follower(LOGGERS["tensorboard"], run.root, run.root / state.FOLDER / "tensorboard.json")
    assert follower.send()
    write(run, range(2, 5), times=10.0)
    assert follower.send()
    assert [(e.step, e.value) for e in board(run).Scalars("loss")] == [(0, 0), (1, 1), (2, 20), (3, 30), (4, 40)]


# The services.


class Seen:
    """What a service has of a run."""

    def __init__(self, runs: int, loss: list[tuple[int, float]], seed: str, tables: dict[str, int], images: int):
        self.runs, self.loss, self.seed, self.tables, self.images = runs, loss, seed, tables, images


def seen_by_wandb(run: RunFolder, id: str) -> Seen:
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    ids, loss, seed, tables, images = set(), [], "", {}, set()
    for path in sorted((run.root / "loggers").glob("wandb/offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record.FromString(data)
            ids |= {record.run.run_id} - {""}
            seed = next((u.value_json for u in record.config.update if u.key == "seed"), seed)
            images |= {e.path for e in record.artifact.manifest.contents if e.path.endswith(".png")}
            items = {i.key or ".".join(i.nested_key): i.value_json for i in record.history.item}
            if "loss" in items:
                loss.append((int(items["_step"]), float(items["loss"])))
            tables |= {k: int(items[f"{k}.nrows"]) for k in ("samples", "results") if f"{k}.nrows" in items}
        store.close()
    assert ids == {id}
    return Seen(len(ids), loss, seed, tables, len(images))


def seen_by_trackio(run: RunFolder, id: str) -> Seen:
    from trackio.sqlite_storage import SQLiteStorage
    from trackio.utils import TRACKIO_DIR

    lines = SQLiteStorage.get_logs("mmopd", id)
    config = SQLiteStorage.get_run_config("mmopd", id) or {}
    tables = {key: len(line[key]["_value"]) for line in lines for key in ("samples", "results") if key in line}
    loss = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    names = [name for name in SQLiteStorage.get_runs("mmopd") if name.startswith(run.root.name)]
    images = list(TRACKIO_DIR.glob("media/mmopd/**/*.png"))
    return Seen(len(names), loss, str(config["seed"]), tables, len(images))


def seen_by_mlflow(run: RunFolder, id: str) -> Seen:
    import mlflow

    client = mlflow.MlflowClient()
    [experiment] = [e for e in client.search_experiments() if e.name == "mmopd"]
    runs = client.search_runs([experiment.experiment_id])
    loss = [(m.step, m.value) for m in client.get_metric_history(id, "loss")]
    tables = {}
    for name in ("samples", "results"):
        with Path(client.download_artifacts(id, f"{name}.json")).open(encoding="utf-8") as file:
            tables[name] = len(json.load(file)["data"])
    images = client.list_artifacts(id, "table_images/samples")
    own = [image for image in images if image.path.endswith(".png")]
    return Seen(len(runs), loss, client.get_run(id).data.params["seed"], tables, len(own) - 1)  # one is for "no image"


SEEN: dict[str, Callable[[RunFolder, str], Seen]] = {
    "wandb": seen_by_wandb,
    "trackio": seen_by_trackio,
    "mlflow": seen_by_mlflow,
}


@pytest.mark.parametrize("name", SERVICES)
def test_a_run_and_its_resume_are_one_run_with_each_step_once(name: str, run: RunFolder) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    write(run, range(3), samples=(0,))
    first = send(name, run)
    write(run, range(2, 5))
    RESULTS.write(run.root)
    second = send(name, run)
    assert (second.state.failed, second.state.error, second.state.steps) == (0, "", 5)
    assert second.state.id == first.state.id
    seen = SEEN[name](run, second.state.id)
    assert seen.runs == 1
    assert seen.loss == [(step, float(step)) for step in range(5)]
    assert seen.seed == "7"
    assert seen.tables == {"samples": 2, "results": 2}
    assert seen.images == 1


# Faults.


class Faulty(Logger):
    """A service that is away for a while."""

    away = True
    sent: list[int]

    def __init__(self, run: Path, id: str) -> None:
        super().__init__(run, id or "x")
        if Faulty.away:
            raise ConnectionError("no network")

    def metrics(self, step: int, values: object) -> None:
        if Faulty.away:
            raise ConnectionError("no network")
        Faulty.sent.append(step)

    def samples(self, step: int, rows: object) -> None:
        raise ValueError("too large")

    def results(self, step: int, results: object) -> None:
        raise ValueError("too large")

    def close(self) -> None:
        pass


def test_what_a_service_missed_it_gets_later_and_what_failed_is_counted_and_said_once(
    run: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    Faulty.away, Faulty.sent = True, []
    write(run, range(3), samples=(1,))
    follower = Follower(Faulty, run.root, run.root / state.FOLDER / "wandb.json")
    assert [follower.send() for _ in range(3)] == [False] * 3
    assert follower.state.failed == 3
    assert [r.getMessage() for r in caplog.records] == ["start: ConnectionError: no network; metrics are tried again"]
    Faulty.away = False
    assert follower.send()
    assert Faulty.sent == [0, 1, 2]  # a table that is refused does not hold up the metrics
    assert follower.state.failed == 4
    assert state.states(run.root)["wandb"].error == "samples: ValueError: too large"


def test_a_call_that_takes_long_is_counted_while_it_lasts(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LATE", 0.05)
    counted = []

    class Slow(Faulty):
        def metrics(self, step: int, values: object) -> None:
            deadline = time.monotonic() + 10
            while not (now := state.states(run.root)["wandb"]).failed and time.monotonic() < deadline:
                time.sleep(0.01)
            counted.append(now.error)

    Faulty.away = False
    write(run, range(1))
    send("wandb", run, Slow)
    assert counted == ["metrics: no answer for 0 s"]


@contextmanager
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> Iterator[None]:
    """Put a package named wandb in front of the real one while the block lasts."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "wandb.py").write_text(code, encoding="utf-8")
    root = Path(follow.__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{root}")
    yield


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise RuntimeError('no key')", "start: RuntimeError: no key"),
        ("print('hanging', flush=True); import time; time.sleep(1000)", "ended with status 137; 0 of 2 steps are sent"),
        ("print('dying', flush=True); import os; os.abort()", "ended with status 134; 0 of 2 steps are sent"),
    ],
    ids=["raises", "hangs", "dies"],
)
def test_a_logger_that_fails_stops_no_run_and_is_said_once(
    code: str, error: str, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "LAST", 3.0)
    console = Console(record=True, width=1000)
    with service(tmp_path, monkeypatch, code), start.logging_to(["wandb"], run, console):
        write(run, range(2))
        deadline = time.monotonic() + 60
        log = run.logs / "logger-wandb.log"
        while not log.stat().st_size and time.monotonic() < deadline:
            time.sleep(0.05)
        begin = time.monotonic()
    assert time.monotonic() - begin < 20
    assert console.export_text().count(error) == 1
    assert state.states(run.root)["wandb"].failed
    assert error in write_report(run.root).read_text(encoding="utf-8")


def test_the_process_of_a_logger_sends_what_is_written_while_it_runs(run: RunFolder) -> None:
    console = Console(record=True, width=1000)
    with start.logging_to(["tensorboard"], run, console):
        deadline = time.monotonic() + 60
        while not (run.root / "tensorboard").is_dir() and time.monotonic() < deadline:
            time.sleep(0.05)
        write(run, range(2))
        RESULTS.write(run.root)
    assert [e.step for e in board(run).Scalars("loss")] == [0, 1]
    assert "results" in board(run).Tags()["tensors"]
    assert console.export_text() == ""
    assert (run.logs / "logger-tensorboard.log").read_text(encoding="utf-8") == ""


def test_a_logger_that_is_not_installed_is_an_error_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "find_spec", lambda name: None)
    said = "loggers: trackio is not installed; `pip install 'mmopd[trackio]'`"
    with pytest.raises(ConfigError) as caught:
        start.check_installed(["trackio"])
    assert said in str(caught.value)
    shown = CliRunner().invoke(app, ["show", "recipes/demo.yaml", "loggers=[trackio]"])
    assert said in str(shown.exception)


def test_a_damaged_state_is_counted_and_stops_nothing(run: RunFolder) -> None:
    (run.root / state.FOLDER / "tensorboard.json").write_bytes(b"\xff{")
    write(run, range(2))
    sent = send("tensorboard", run).state
    assert (sent.steps, sent.failed) == (2, 1)
    assert "tensorboard.json is damaged" in sent.error


def test_a_picture_is_all_images_of_a_sample_next_to_each_other() -> None:
    [image] = row().images
    picture = picture_of(row(images=[image, image]))
    assert picture is not None
    assert picture.size == (128, 32)
    assert picture_of(row(images=[])) is None


def test_a_picture_is_upright_and_bounded_as_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    lying, file = Image.new("RGB", (40, 30)), io.BytesIO()
    lying.getexif()[0x0112] = 6  # to be turned by a quarter
    lying.save(file, "JPEG", exif=lying.getexif())
    encoded = base64.b64encode(file.getvalue()).decode()
    assert (picture := picture_of(row(images=[encoded]))) is not None
    assert picture.size == (30, 40)
    monkeypatch.setattr(heatmap, "PIXELS", 1199)
    with pytest.raises(ValueError, match="40 x 30 pixels"):
        picture_of(row(images=[encoded]))
