"""Lines of `mmopd doctor` about GPUs, of which torch.cuda is faked where it is read."""

import dataclasses
import subprocess
from types import SimpleNamespace

import pytest
import torch

from mmopd.commands import gpus
from mmopd.commands.gpus import GIB, Gpu, Machine, gpu_checks, gpu_report

H200 = Gpu("NVIDIA H200", 138 * GIB, 140 * GIB, (9, 0))
KERNELS = ["sm_75", "sm_80", "sm_90", "sm_100", "compute_120"]
MACHINE = Machine([H200] * 2, 13000, "13.0", KERNELS, "sdpa", "FLASH_ATTN", "", {"NV18": 1})
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\t0-15
GPU1\tNV18\t X \tSYS\t0-15
GPU2\tSYS\tSYS\t X \t0-15

Legend:
"""


def states(machine: Machine) -> dict[str, str]:
    return {check.name: check.state for check in gpu_checks(machine)}


def but(**gpu: object) -> Machine:
    return dataclasses.replace(MACHINE, gpus=[dataclasses.replace(H200, **gpu)])


def test_each_gpu_and_what_uses_it_is_said() -> None:
    found = {check.name: check.found for check in gpu_checks(MACHINE)}
    assert set(states(MACHINE).values()) == {"ok"}
    assert found["GPU 1"] == "NVIDIA H200, 138.0 of 140.0 GiB free, compute capability 9.0"
    assert found["attention"] == "trainer: sdpa; engines: FLASH_ATTN"
    assert found["flashinfer"].startswith("not installed")
    assert found["GPU links"] == "NV18 (1 pairs)"


def test_memory_that_another_program_has_is_a_warning() -> None:
    assert states(but(free=100 * GIB))["GPU 0"] == "warn"


@pytest.mark.parametrize(
    ("capability", "state"), [((8, 9), "ok"), ((7, 0), "fail"), ((11, 0), "fail"), ((12, 1), "ok")]
)
def test_a_gpu_for_which_torch_has_no_kernels_is_a_failure(capability: tuple[int, int], state: str) -> None:
    assert states(but(capability=capability))["GPU 0"] == state


@pytest.mark.parametrize(("driver", "state"), [(13010, "ok"), (13000, "ok"), (12080, "fail")])
def test_a_driver_is_compared_with_the_cuda_that_torch_is_built_for(driver: int, state: str) -> None:
    (check, *_) = gpu_checks(dataclasses.replace(MACHINE, driver=driver))
    assert (check.name, check.state) == ("GPU driver", state)
    assert check.found.endswith("torch is built for 13.0")


def test_a_machine_is_read_from_torch_and_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name, value in {
        "device_count": lambda: 3,
        "mem_get_info": lambda i: (H200.free, H200.total),
        "get_device_name": lambda i: H200.name,
        "get_device_capability": lambda i: H200.capability,
        "get_arch_list": lambda: KERNELS,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpus, "driver", lambda: 13000)
    monkeypatch.setattr(gpus, "_engine_attention", lambda: "FLASH_ATTN")
    monkeypatch.setattr(gpus, "_trainer_attention", lambda: "sdpa")
    monkeypatch.setattr(gpus.shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: SimpleNamespace(stdout=TOPOLOGY))
    assert gpus.look() == dataclasses.replace(MACHINE, gpus=[H200] * 3, links={"NV18": 1, "SYS": 2})


def test_a_cpu_build_of_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: pytest.fail("asked"))
    monkeypatch.setattr(gpus, "version_of", lambda name: "2.13.0+cpu")
    assert gpu_report() == []


def test_a_process_that_fails_is_a_line_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "version_of", lambda name: "2.13.0+cu130")
    monkeypatch.setattr(gpus, "driver", lambda: 13000)
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nImportError: no vllm\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: failed)
    (check,) = gpu_report()
    assert (check.state, check.found) == ("fail", "ImportError: no vllm")
