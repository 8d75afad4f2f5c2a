"""Measure answers judged per second on one core, by verifier: `python benchmarks/verifiers.py`, under a minute.

Programs run in the sandbox. They are compared with the plain way, which starts an interpreter for each (`python -I -S`,
without any protection), and with `python -I`, as other harnesses start it. Everything is pinned to one core. The other
verifiers judge their cases of tests/verifier_cases.yaml repeatedly, in this process; the pool's line is the cost of a
question between processes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import yaml
from rich.console import Console
from rich.table import Table

from mmopd.task import code, documents, verify
from mmopd.task.verifier_pool import VerifierPool

SECONDS = 3.0
CASES = Path(__file__).parents[1] / "tests" / "verifier_cases.yaml"
PROGRAM = "import sys, heapq, collections\nn = int(sys.stdin.readline())\nprint(sum(i * i for i in range(n)))"
ANSWER = f"```python\n{PROGRAM}\n```"


def tests(n: int) -> str:
    """Return an answer key with n tests."""
    inputs = [100 + i for i in range(n)]
    return json.dumps(
        {"inputs": [f"{i}\n" for i in inputs], "outputs": [f"{sum(k * k for k in range(i))}\n" for i in inputs]}
    )


def rate(work: Callable[[], object]) -> float:
    """Return calls per second: the median of five periods, after one call that is not counted."""
    work()
    spells = []
    for _ in range(5):
        begin = time.perf_counter()
        calls = 0
        while time.perf_counter() - begin < SECONDS / 5:
            work()
            calls += 1
        spells.append(calls / (time.perf_counter() - begin))
    return median(spells)


def interpreter(*flags: str) -> Callable[[], object]:
    """Return a function that runs the program in a new interpreter."""
    command = [sys.executable, *flags, "-c", PROGRAM]
    return lambda: subprocess.run(command, input=b"100\n", capture_output=True, check=True)


def main() -> None:
    """Print the two tables."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})
    console = Console()
    cases = yaml.safe_load(CASES.read_text(encoding="utf-8"))
    judge = code.verifier()
    ten = tests(10)
    assert judge(ANSWER, ten).value == 1
    table = Table(
        "programs", "a second, on one core", "against an interpreter each", title="One run of a short program"
    )
    plain = rate(interpreter("-I", "-S"))
    runs = 10 * rate(lambda: judge(ANSWER, ten))
    table.add_row("sandbox, 10 tests a program", f"{runs:.0f}", f"{runs / plain:.1f} x")
    single = tests(1)
    runs = rate(lambda: judge(ANSWER, single))
    table.add_row("sandbox, 1 test a program", f"{runs:.0f}", f"{runs / plain:.1f} x")
    table.add_row("python -I -S, unprotected", f"{plain:.0f}", "1")
    runs = rate(interpreter("-I"))
    table.add_row("python -I, unprotected", f"{runs:.0f}", f"{runs / plain:.1f} x")
    console.print(table)

    table = Table("verifier", "answers a second", title="Cases of tests/verifier_cases.yaml, one core")
    verifiers = {"math": verify.math, "choice": verify.choice, "exact": verify.exact, "puzzle": verify.puzzle}
    verifiers |= {
        "relaxed_number": documents.relaxed_number,
        "anls": documents.anls,
        "final_number": verify.final_number,
    }
    for name, ours in verifiers.items():
        part = [case[:2] for case in cases[name]]
        table.add_row(name, f"{len(part) * rate(lambda ours=ours, part=part: [ours(*case) for case in part]):,.0f}")  # type: ignore[misc]
    with VerifierPool(workers=1) as pool:
        asked = [("= 8", "8")] * 50
        spell = rate(lambda: [future.result() for future in [pool.submit("additions", *one) for one in asked]])
        table.add_row("number_after_equals, through the pool", f"{50 * spell:,.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
