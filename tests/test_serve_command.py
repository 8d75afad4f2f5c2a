"""Fleets: the servers that they describe, `mmopd serve`, and `mmopd train --endpoints`, with a vLLM that starts
immediately.
"""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from fake_package import fake_model, install
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner
from waiting import wait_for

from mmopd.cli import app
from mmopd.config import Engine, Fleet, Teacher
from mmopd.errors import UserError
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.serving import endpoint
from mmopd.serving.endpoint import UNKNOWN, Endpoint
from mmopd.serving.lora import lora_flags, read_adapter
from mmopd.serving.specs import to_specs
from mmopd.teacher.fleet import from_files, running_elsewhere, serve_fleet

FLEET = """
teachers:
  math: {model: models/math}
  code: {model: models/code, replicas: 2}
  far: {endpoints: ["http://127.0.0.1:1"]}
routes: [{teacher: math}]
"""


def make_adapter(
    folder: Path, rank: int = 8, key: str = "base_model.model.model.layers.0.self_attn.q_proj", **config: object
) -> Path:
    folder.mkdir(parents=True)
    weights = {f"{key}.lora_A.weight": torch.zeros(rank, 4), f"{key}.lora_B.weight": torch.zeros(4, rank)}
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 16, **config}), encoding="utf-8"
    )
    return folder


# The servers that a fleet describes


def test_adapters_of_one_model_share_its_servers_and_others_do_not(tmp_path: Path) -> None:
    first, second = make_adapter(tmp_path / "a", rank=4), make_adapter(tmp_path / "b", rank=9)
    base, engine, shared = Path("base"), Engine(port=5000), Engine(port=6000)
    teachers = {
        "plain": Teacher(model=base, engine=engine, replicas=2),
        "other": Teacher(model=Path("other")),
        "algebra": Teacher(model=base, engine=shared, replicas=2, adapter=first),
        "geometry": Teacher(model=base, engine=shared, replicas=2, adapter=second),
        "longer": Teacher(model=base, engine=Engine(max_model_len=9)),
        "there": Teacher(model=base, engine=engine, replicas=2),
        "far": Teacher(endpoints=("http://x",)),
    }
    specs = to_specs(Fleet(teachers=teachers, routes=()), elsewhere={"there"})
    assert [spec.name for spec in specs] == [
        "plain.0",
        "plain.1",
        "other.0",
        "algebra+geometry.0",
        "algebra+geometry.1",
        "longer.0",
    ]
    assert [spec.engine.port for spec in specs] == [5000, 5001, None, 6000, 6001, None]
    assert specs[4].adapters == {"algebra.1": read_adapter(first), "geometry.1": read_adapter(second)}
    assert specs[4].served == ["algebra.1", "geometry.1"]  # but not the model itself
    assert specs[0].served == ["plain.0"]
    assert not any(spec.updatable for spec in specs)


def test_the_flags_make_room_for_the_largest_adapter_and_name_each(tmp_path: Path) -> None:
    plain = read_adapter(make_adapter(tmp_path / "a", rank=4, rank_pattern={"q_proj": 17}))
    vision = read_adapter(make_adapter(tmp_path / "b", rank=8, key="base_model.model.model.visual.blocks.0.attn.proj"))
    flags = " ".join(lora_flags({"a.0": plain, "b.0": vision}))
    assert flags.startswith(
        "--enable-lora --max-loras 2 --max-lora-rank 32 --enable-tower-connector-lora --lora-target-modules "
    )
    assert flags.endswith(f" q_proj visual.blocks.0.attn.proj --lora-modules a.0={tmp_path}/a b.0={tmp_path}/b")
    assert "tower" not in " ".join(lora_flags({"a.0": plain}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"r": 4096}, "rank 4096; vLLM serves ranks 1 to 512"),
        ({"r": "8"}, "adapter_config.json"),
        (
            {"key": "base_model.model.model.visual.patch_embed.proj"},
            "vLLM would ignore 'base_model.model.model.visual.patch_embed.proj.lora_A.weight'",
        ),
        ({"key": "base_model.model.lm_head"}, "vLLM would ignore 'base_model.model.lm_head"),
    ],
)
def test_an_adapter_that_vllm_would_serve_wrongly_is_refused(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    folder = make_adapter(tmp_path / "a", key=change.pop("key", "q_proj"))
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(message)):
        read_adapter(folder)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the folder has no adapter_config\.json"):
        read_adapter(tmp_path)
    folder = make_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="not a safetensors file"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="not the configuration of a LoRA adapter"):
        read_adapter(folder)


# Endpoints that run elsewhere


@pytest.fixture(scope="module")
def served(server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Command"]:
    """Run `mmopd serve` in its own folder; its key comes from the environment."""
    command = Command(
        tmp_path_factory.mktemp("served"), "serve", "fleet.yaml", "--out", "out/fleet.json", "--api-key-env", "NODE_KEY"
    )
    command.wait_for("Ctrl-C stops.")
    yield command
    command.assert_stops_cleanly(signal.SIGTERM, "out/fleet.json")


class Command:
    """A `mmopd` command in a folder with a fleet, marked so that every process it starts can be found."""

    def __init__(self, folder: Path, *args: str) -> None:
        self.folder, self.mark, self.key = folder, uuid.uuid4().hex, f"key-{uuid.uuid4().hex}"
        (folder / "fleet.yaml").write_text(FLEET, encoding="utf-8")
        for name in ("math", "code"):
            fake_model(folder / "models" / name)
        env = {**os.environ, "PYTHONPATH": install(folder), "MARK": self.mark, "NODE_KEY": self.key, "COLUMNS": "200"}
        self.output = folder / "output"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mmopd", *args], cwd=folder, env=env, stdout=file, stderr=file
            )

    def wait_for(self, text: str) -> str:
        wait_for(
            lambda: text in self.output.read_text(encoding="utf-8") or self.process.poll() is not None,
            [self.folder],
            every=0.05,
        )
        said = self.output.read_text(encoding="utf-8")
        assert text in said, said
        return said

    def assert_stops_cleanly(self, number: signal.Signals, endpoints: str) -> None:
        assert (self.folder / endpoints).exists()
        self.process.send_signal(number)
        assert self.process.wait(20) == 0
        assert not (self.folder / endpoints).exists()
        assert not self.survivors()
        assert self.output.read_text(encoding="utf-8").endswith("stopped\n")

    def survivors(self) -> list[str]:
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_text(encoding="utf-8"))
            except OSError:
                continue
        return found


def get(one: Endpoint, path: str) -> dict[str, int]:
    reply: dict[str, int] = httpx.get(one.url + path, headers=one.headers).raise_for_status().json()
    return reply


def test_serve_says_where_everything_is_and_how_to_use_it(served: Command) -> None:
    said, path = served.output.read_text(encoding="utf-8"), served.folder / "out" / "fleet.json"
    found = endpoint.load(path)
    assert list(found) == ["math.0", "code.0", "code.1"]  # `far` runs elsewhere
    assert path.stat().st_mode & 0o777 == 0o600
    for one in found.values():
        assert re.search(rf"{one.name}.*{one.url}.*models/{one.teacher}.*CPU", said)
        assert one.url.startswith("http://127.0.0.1:")
        assert get(one, "/v1/models")
        assert one.api_key == served.key
    assert "mmopd train RECIPE --endpoints out/fleet.json" in said
    assert "warning" not in said
    assert served.key not in said


def test_serve_shows_what_dies_and_comes_back(served: Command) -> None:
    one = endpoint.load(served.folder / "out" / "fleet.json")["code.1"]
    os.kill(get(one, "/pids")["server"], signal.SIGKILL)
    said = served.wait_for("code.1: ready")
    assert re.search(r"\d\d:\d\d:\d\d code\.1: ended with status -9, started again\n", said)
    assert get(one, "/v1/models")


@pytest.mark.usefixtures("server")
def test_serve_warns_where_others_can_reach_it_and_stops_at_ctrl_c(tmp_path: Path) -> None:
    command = Command(tmp_path, "serve", "fleet.yaml", "--host", "0.0.0.0")
    said = command.wait_for("Ctrl-C stops.")
    assert "warning: others reach --host 0.0.0.0 too; they need the key" in said
    found = endpoint.load(tmp_path / "endpoints.json")
    assert all(one.url.startswith(f"http://{socket.gethostname()}:") for one in found.values())
    assert len({one.api_key for one in found.values()} - {command.key}) == 1  # a new key
    command.assert_stops_cleanly(signal.SIGINT, "endpoints.json")


def test_a_key_or_a_teacher_that_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(FLEET, encoding="utf-8")
    with pytest.raises(UserError, match=r"the environment variable NODE_KEY \(--api-key-env\) is not set"):
        CliRunner().invoke(app, ["serve", str(fleet), "--api-key-env", "NODE_KEY"], catch_exceptions=False)
    monkeypatch.setenv("NODE_KEY", "se cret\n")
    with pytest.raises(UserError, match="NODE_KEY") as error:
        CliRunner().invoke(app, ["serve", str(fleet), "--api-key-env", "NODE_KEY"], catch_exceptions=False)
    assert "cret" not in str(error.value)
    fleet.write_text('teachers: {far: {endpoints: ["http://x"]}}\nroutes: []', encoding="utf-8")
    with pytest.raises(UserError, match="there is nothing to serve"):
        CliRunner().invoke(app, ["serve", str(fleet)], catch_exceptions=False)


def test_a_run_uses_what_another_job_serves_and_serves_the_rest(
    served: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", install(tmp_path))
    teachers = {name: Teacher(model=fake_model(tmp_path / name)) for name in ("here", "math")}
    fleet, path = (
        Fleet(teachers={**teachers, "code": Teacher(model=Path("not/here"))}, routes=()),
        served.folder / "out" / "fleet.json",
    )
    elsewhere = from_files(fleet, [path])
    with (
        Children() as children,
        Stages(Console(quiet=True)) as stages,
        serve_fleet(fleet, children, tmp_path, stages, elsewhere=elsewhere) as servers,
    ):
        assert servers.keys() == {"here.0", "math.0", "code.0", "code.1"}
        assert {log.stem for log in tmp_path.glob("*.log")} == {"servers", "here.0"}
        assert servers["math.0"] == endpoint.load(path)["math.0"]


def test_a_teacher_in_two_files_has_the_replicas_of_both(served: Command, tmp_path: Path) -> None:
    fleet = Fleet(teachers={name: Teacher(model=Path(name)) for name in ("math", "code")}, routes=())
    path = served.folder / "out" / "fleet.json"
    found = from_files(fleet, [path, path])
    assert [one.name for one in found] == ["math.0", "math.1", "code.0", "code.1", "code.2", "code.3"]
    assert [one.model for one in found] == ["math.0", "math.0", "code.0", "code.1", "code.0", "code.1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "maths.0"}, "the fleet has no teacher 'maths'; did you mean 'math'"),
        ({"name": "student", "role": "student"}, "the fleet has no teacher 'student'"),
        ({"model": "another"}, "serves math.0, not 'another'"),
        ({"api_key": "expired"}, r"rejects the API key \(status 401\)"),
        ({"url": "http://127.0.0.1:1"}, "does not answer as a vLLM server"),
        ({"url": "no url"}, "does not answer as a vLLM server"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_named(
    served: Command, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    path, fleet = tmp_path / "one.json", Fleet(teachers={"math": Teacher(model=Path("math"))}, routes=())
    (record,) = [
        one
        for one in json.loads((served.folder / "out" / "fleet.json").read_text(encoding="utf-8"))
        if one["name"] == "math.0"
    ]
    endpoint.save(path, [Endpoint(**(record | change))])
    with pytest.raises(UserError, match=message) as error:
        from_files(fleet, [path])
    assert str(path) in str(error.value)
    assert served.key not in str(error.value)


def test_a_file_that_is_no_file_of_endpoints_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.json"
    with pytest.raises(UserError, match="no such file of endpoints"):
        endpoint.load(path)
    for text in ("nothing", '{"name": "a"}', '[{"name": "a", "api_key": "secret"}]'):
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)
        with pytest.raises(UserError, match="not a file of endpoints that `mmopd serve` wrote") as error:
            endpoint.load(path)
        assert "secret" not in str(error.value)
    path.write_text("[]", encoding="utf-8")
    path.chmod(0o640)
    with pytest.raises(UserError, match=f"chmod 600 {path}"):
        endpoint.load(path)


def test_the_servers_of_a_fleet_file_are_asked_for_their_model(
    served: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = endpoint.load(served.folder / "out" / "fleet.json")["math.0"].url
    monkeypatch.setenv("FAR_KEY", served.key)
    found = running_elsewhere("far.0", f"{url}/v1/", "FAR_KEY")
    assert dataclasses.replace(found, fingerprint=UNKNOWN) == Endpoint("far.0", url, "math.0", served.key, "teacher")
    assert found.fingerprint.weights.startswith("math.0")
    with pytest.raises(UserError, match="rejects the API key"):
        running_elsewhere("far.0", url, None)
    monkeypatch.delenv("FAR_KEY")
    with pytest.raises(UserError, match=r"teacher far\.0: the environment variable FAR_KEY \(api_key_env\) is not set"):
        running_elsewhere("far.0", url, "FAR_KEY")


def test_train_and_resume_take_the_file(tmp_path: Path) -> None:
    missing = ["--endpoints", str(tmp_path / "missing.json")]
    for command in (
        ["recipes/demo.yaml", "prepare=null", "--run", str(tmp_path / "run")],
        ["--resume", str(tmp_path / "run")],
    ):
        with pytest.raises(UserError, match=r"missing\.json: no such file of endpoints"):
            CliRunner().invoke(app, ["train", *command, *missing], catch_exceptions=False)
    assert "missing.json" not in (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8")
