"""Measure the peak memory of a part of a program, from Linux's own high-water mark."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")


@contextmanager
def peak_mib(found: list[float]) -> Iterator[None]:
    """Append the maximum growth of the process in MiB while the block ran."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the mark to current memory
    before = _mib("VmRSS")
    yield
    found.append(_mib("VmHWM") - before)


def _mib(name: str) -> float:
    match = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
    assert match
    return int(match[1]) / 1024
