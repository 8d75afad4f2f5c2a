"""Servers whose answers do not depend on concurrent requests, to the last bit.

Intel's MKL chooses a kernel by the number of rows of a product: on CPUs with AVX-512 an image that is encoded together
with others gets other last bits than alone. `MKL_CBWR=BRANCH,STRICT` asks for one kernel. On CPUs that are not Intel's,
MKL takes its own choice for every branch but COMPATIBLE, and that one does not hold there: nothing is set.
docs/repetition.md has what was measured. On GPUs it is vLLM's batch invariance. [not run on a GPU]
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmopd.config import Engine

MKL = "MKL_CBWR"
BATCH_INVARIANT = "VLLM_BATCH_INVARIANT"
INTEL = "GenuineIntel"
UNREPEATABLE = "last bits depend on what is asked together"
AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}  # what MKL's AVX-512 branch needs
WIDEST = ("amx_tile", "avx512_bf16", "avx512f", "avx2")  # vLLM, oneDNN and torch choose their kernels by these


@dataclass(frozen=True, slots=True)
class Cpu:
    """The properties of a CPU that decide which kernels the libraries use."""

    vendor: str  # as /proc/cpuinfo names it
    model: str
    flags: frozenset[str]


@cache
def this_cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Cpu:
    """Return the CPU of this machine as Linux describes it; the names are empty if it does not."""
    lines = (
        [line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines()] if cpuinfo.is_file() else []
    )
    found = {key.strip(): value.strip() for key, _, value in reversed(lines)}  # the first core's, which come last here
    return Cpu(found.get("vendor_id", ""), found.get("model name", ""), frozenset(found.get("flags", "").split()))


def mkl_branch(vendor: str, flags: Collection[str]) -> str:
    """Return the cheapest value of MKL_CBWR that fixes the kernels of a CPU; it is empty if MKL has none."""
    if vendor != INTEL:
        return ""
    return "AVX512,STRICT" if set(flags) >= AVX512 else "AVX2,STRICT"


def environment(engine: Engine, *, gpu: bool) -> dict[str, str]:
    """Return the variables of a server; what the user has set is left as it is."""
    return {name: value for name, value in _wanted(engine, gpu=gpu).items() if value and name not in os.environ}


def holds(engine: Engine, *, gpu: bool) -> bool:
    """Return true if the answers of a server of this machine do not depend on concurrent requests."""
    asked = engine.repeatable if gpu else engine.repeatable is not False
    return bool(asked) and all(os.environ.get(name, value) == value for name, value in _wanted(engine, gpu=gpu).items())


def kernels(engine: Engine, *, gpu: bool) -> str:
    """Describe in one line what decides the last bits of a server's answers; it ends with UNREPEATABLE unless `holds`.

    Servers with the same line give the same answers if the setting holds.
    """
    name = BATCH_INVARIANT if gpu else MKL
    value = {**environment(engine, gpu=gpu), **os.environ}.get(name, "")
    setting = f"{name}={value}" if value else f"no {name}"
    if not gpu:
        cpu = this_cpu()
        widest = next((flag for flag in WIDEST if flag in cpu.flags), "no AVX2")
        setting = f"{setting} on {cpu.model or 'an unknown CPU'} ({widest})"
    return setting if holds(engine, gpu=gpu) else f"{setting}, {UNREPEATABLE}"


def _wanted(engine: Engine, *, gpu: bool) -> dict[str, str]:
    """Return the variables that make an engine's answers repeatable, if the setting asks for it.

    An empty value leaves MKL its own choice.
    """
    if gpu:
        return {BATCH_INVARIANT: "1"} if engine.repeatable else {}
    cpu = this_cpu()
    return {} if engine.repeatable is False else {MKL: mkl_branch(cpu.vendor, cpu.flags)}
