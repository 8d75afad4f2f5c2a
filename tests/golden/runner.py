"""Run the worker of a checkout on one and on two ranks, and compare what two runs found."""

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LOSSES = HERE / "losses.json"
RANKS = (1, 2)


@dataclass(frozen=True)
class Difference:
    """The distance of two runs of a case: the largest `|a - b| / max(1, |a|)` over the updates that both made."""

    case: str
    updates: int
    loss: float
    grad_norm: float
    weights: bool  # a checksum differs
    first: int | None  # the update with the first difference, from 0; None if all bits are equal

    @property
    def identical(self) -> bool:
        """True if losses, gradient norms and weights are equal to the bit."""
        return self.first is None and not self.weights

    def within(self, tolerance: float) -> bool:
        """Return True if losses and gradient norms are that near; checksums of weights cannot be near."""
        return max(self.loss, self.grad_norm) <= tolerance


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    """Compare the cases that both results have, each over as many updates as the shorter run has."""
    return [_difference(case, a["cases"][case], found) for case, found in b["cases"].items() if case in a["cases"]]


def _difference(case: str, a: Mapping[str, list[Any]], b: Mapping[str, list[Any]]) -> Difference:
    pairs = {name: list(zip(a[name], b[name], strict=False)) for name in ("loss", "grad_norm", "weights")}
    apart = {name: [abs(x - y) / max(1.0, abs(x)) for x, y in pairs[name]] for name in ("loss", "grad_norm")}
    largest = {
        name: max(math.inf if math.isnan(value) else value for value in values) for name, values in apart.items()
    }
    unequal = [k for name in apart for k, (x, y) in enumerate(pairs[name]) if x != y]
    weights = any(x != y for x, y in pairs["weights"])
    return Difference(
        case, len(pairs["loss"]), largest["loss"], largest["grad_norm"], weights, min(unequal, default=None)
    )


def run(root: Path, size: Literal["full", "quick"]) -> dict[str, Any]:
    """Return what a checkout's own worker finds on the responses of this one: the machine, and the cases by name.

    Raises:
        RuntimeError: the checkout has no worker, or a rank failed.
    """
    worker = root / "tests" / "golden" / "worker.py"
    if not worker.is_file():
        raise RuntimeError(f"{root} has no {worker.relative_to(root)}: the revision is older than the golden losses")
    results: dict[str, Any] = {"machine": {}, "cases": {}}
    with TemporaryDirectory(prefix="mmopd-golden-") as folder:
        for ranks in RANKS:
            found = _run(
                root,
                [str(worker), f"{folder}/student", str(HERE / "responses.json"), f"{folder}/out.json", size],
                ranks,
            )
            results = {"machine": found["machine"], "cases": results["cases"] | found["cases"]}
    return results


def _run(root: Path, arguments: list[str], size: int) -> dict[str, Any]:
    """Run a worker on `size` ranks of one thread each, so that the number of cores has no part in the bits."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = Path(arguments[3])
    env = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env |= {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    env["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    logs = [out.with_name(f"rank-{rank}-of-{size}.log") for rank in range(size)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w", encoding="utf-8") as stream:
                one = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(
                    subprocess.Popen([sys.executable, *arguments], env=one, stdout=stream, stderr=subprocess.STDOUT)
                )
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            time.sleep(0.2)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
    if codes != [0] * size:
        raise RuntimeError(
            "\n".join([f"the ranks ended with {codes}", *(log.read_text(encoding="utf-8")[-3000:] for log in logs)])
        )
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


@contextmanager
def checkout(revision: str | None) -> Iterator[Path]:
    """Yield a temporary git worktree of a revision, or the working tree if there is no revision."""
    if revision is None:
        yield ROOT
        return
    with TemporaryDirectory(prefix="mmopd-golden-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
