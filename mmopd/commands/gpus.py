"""What `mmopd doctor` says about GPUs: memory, driver, kernels, attention, and how they are joined. Not run on a GPU.

`python -m mmopd.commands.gpus` prints a `Machine`. `gpu_report` asks such a process, since one that has looked at a
GPU keeps some hundred MiB of its memory.
"""

import ctypes
import dataclasses
import importlib.metadata
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

from mmopd.preflight.check import Check

GIB = 2**30
HEAD = 128  # size of an attention head in all students of the shipped recipes
TAKEN = 0.1  # share of a GPU's memory in use that is worth a warning


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that torch can use."""

    name: str
    free: int  # bytes
    total: int  # bytes
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Machine:
    """The GPUs of this machine, and what the installed packages do with them."""

    gpus: list[Gpu]
    driver: int  # the newest CUDA that the driver supports: 1000 x major + 10 x minor; 0 without a driver
    cuda: str  # CUDA version that torch is built for
    kernels: list[str]  # architectures for which torch has kernels, such as sm_90
    trainer: str  # attention of the trainer
    engine: str  # attention of vLLM
    flashinfer: str  # its version, or empty
    links: dict[str, int]  # pairs of GPUs by the way they are joined


def gpu_checks(machine: Machine) -> list[Check]:
    """Return the lines about GPUs."""
    checks = [_driver(machine), *(_gpu(number, gpu, machine) for number, gpu in enumerate(machine.gpus))]
    if machine.gpus:
        checks += [
            Check("attention", "ok", f"trainer: {machine.trainer}; engines: {machine.engine}"),
            Check("flashinfer", "ok", machine.flashinfer or "not installed: vLLM takes other kernels"),
        ]
    if machine.links:
        ways = ", ".join(f"{way} ({number} pairs)" for way, number in machine.links.items())
        checks.append(Check("GPU links", "ok", ways))
    return checks


def _driver(machine: Machine) -> Check:
    found = f"supports CUDA {machine.driver // 1000}.{machine.driver % 1000 // 10}; torch is built for {machine.cuda}"
    # Within a major version an older driver runs newer code.
    if machine.driver // 1000 < int(machine.cuda.partition(".")[0]):
        way_out = "update the driver, or install a torch and a vLLM that are built for an older CUDA"
        return Check("GPU driver", "fail", found, way_out)
    return Check("GPU driver", "ok", found)


def _gpu(number: int, gpu: Gpu, machine: Machine) -> Check:
    major, minor = gpu.capability
    found = f"{gpu.name}, {gpu.free / GIB:.1f} of {gpu.total / GIB:.1f} GiB free, compute capability {major}.{minor}"
    name = f"GPU {number}"
    # Kernels of a lower minor version run, too; PTX (compute_XY) is compiled for every later GPU.
    there = [
        (kind, int(digits) // 10, int(digits) % 10)
        for kind, digits in (
            found.groups() for found in map(re.compile(r"(sm|compute)_(\d+)").match, machine.kernels) if found
        )
    ]
    runs = any((x == major and y <= minor) if kind == "sm" else (x, y) <= (major, minor) for kind, x, y in there)
    if not runs:
        way_out = f"torch has kernels for {', '.join(machine.kernels)} only: install a build of torch for this GPU"
        return Check(name, "fail", found, way_out)
    if gpu.free < (1 - TAKEN) * gpu.total:
        return Check(name, "warn", found, "another program uses it: see nvidia-smi, end it or lower gpu_share")
    return Check(name, "ok", found)


def gpu_report() -> list[Check]:
    """Return the lines about GPUs, as a new process sees them; none if torch is a CPU build or there is no driver."""
    from mmopd.runtime import python

    if (version_of("torch") or "+cpu").endswith("+cpu") or not driver():
        return []
    done = subprocess.run(
        python.command("-m", __name__), capture_output=True, text=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode:
        said = next(iter(done.stderr.strip().splitlines()[-1:]), f"status {done.returncode}")
        return [Check("GPUs in use", "fail", said, f"call python -m {__name__}: it prints the whole error")]
    found = json.loads(done.stdout.splitlines()[-1])  # libraries may print something before
    gpus = [Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in found.pop("gpus")]
    return gpu_checks(Machine(gpus=gpus, **found))


def version_of(distribution: str) -> str | None:
    """Return the installed version, from metadata only."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def look() -> Machine:
    """Return this machine's GPUs, seen from this process."""
    import torch

    count = torch.cuda.device_count()
    gpus = []
    for i in range(count):
        free, total = torch.cuda.mem_get_info(i)
        gpus.append(Gpu(torch.cuda.get_device_name(i), free, total, torch.cuda.get_device_capability(i)))
    return Machine(
        gpus=gpus,
        driver=driver(),
        cuda=torch.version.cuda or "0",
        kernels=torch.cuda.get_arch_list(),
        trainer=_trainer_attention() if gpus else "",
        engine=_engine_attention() if gpus else "",
        flashinfer=version_of("flashinfer-python") or "",
        links=links(count),
    )


def driver() -> int:
    """Return the newest CUDA that the driver supports, as `Machine.driver`."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def links(count: int) -> dict[str, int]:
    """Return the pairs of GPUs by the way they are joined: NV18 (NVLink), PIX ... SYS (PCIe), as nvidia-smi says."""
    import torch

    if count < 2:
        return {}
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "topo", "-m"]
        said = subprocess.run(asked, capture_output=True, text=True, encoding="utf-8", check=False).stdout
        rows = [line.split()[1:] for line in said.splitlines() if re.match(r"GPU\d+\s", line)]
        return dict(Counter(rows[i][j] for i, j in itertools.combinations(range(len(rows)), 2)))
    direct = (torch.cuda.can_device_access_peer(i, j) for i, j in itertools.combinations(range(count), 2))
    return dict(Counter("direct" if one else "through the CPU" for one in direct))


def _trainer_attention() -> str:
    from mmopd.train.students import attention

    return attention()


def _engine_attention() -> str:
    """Return the attention that vLLM takes for a bfloat16 model, of heads of HEAD numbers, without further settings."""
    import torch

    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.selector import AttentionSelectorConfig

        asked = AttentionSelectorConfig(head_size=HEAD, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=None)
        capability = current_platform.get_device_capability()
        there, _ = current_platform.get_valid_backends(device_capability=capability, attn_selector_config=asked)
    except Exception as error:  # a line for the reader, which no run depends on
        return f"unknown ({type(error).__name__}: {error})"
    return min(there, key=lambda candidate: candidate.priority).backend.name if there else "none"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(dataclasses.asdict(look())) + "\n")
