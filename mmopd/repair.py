"""Make a CPU environment importable: `python -m mmopd.repair` (does nothing if nothing is broken).

On the package index, torchvision, torchaudio and torchcodec are CUDA builds, which do not load with the CPU build of
torch. torchaudio and torchcodec are not needed and are uninstalled, because vLLM fails if they are present. mmopd needs
only the Python code of torchvision: an import hook defines the two operators without which it cannot be imported. The
hook is a `.pth` file, because vLLM's spawned workers must load it too; it does nothing if torchvision's own operators
load.
"""

import importlib.metadata
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

from rich.console import Console

from mmopd.errors import UserError

HOOK = "mmopd_torchvision_hook"
HOOK_SOURCE = '''"""Defines two operators that a CUDA torchvision cannot load with a CPU torch.

Written by `python -m mmopd.repair`.
"""

import sys


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import importlib.machinery

            spec = importlib.machinery.PathFinder.find_spec(name, path)
            if spec is not None and spec.origin is not None:
                _define(spec.origin)
        return None


def _define(init):
    from pathlib import Path

    import torch

    try:
        for library in Path(init).parent.glob("_C*.so"):
            torch.ops.load_library(library)
            return  # its own operators work
    except OSError:
        pass
    for operator in ("nms", "qnms"):
        try:
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
        except RuntimeError:  # there already
            pass


sys.meta_path.insert(0, _Finder())
'''


def is_cpu_torch() -> bool:
    """Return true if the installed torch is a CPU build, according to its version."""
    return installed("torch") and importlib.metadata.version("torch").endswith("+cpu")


def imports(module: str) -> bool:
    """Return true if `module` imports in a fresh interpreter."""
    command = [sys.executable, "-P", "-c", f"import {module}"]  # -P: nothing from the current folder
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def torchvision_loads() -> bool:
    """Return true if torchvision imports, judging by its files; a real import takes seconds.

    Its operators do not load if they were built for CUDA and torch was not; then it does not import without the hook.
    """
    site = importlib.metadata.distribution("torchvision").locate_file("")
    libraries = list(Path(str(site), "torchvision").glob("_C*.so"))
    wants_cuda = any(b"libtorch_cuda.so" in library.read_bytes() for library in libraries)
    return not wants_cuda or not is_cpu_torch() or importlib.util.find_spec(HOOK) is not None


def installed(package: str) -> bool:
    """Return true if `package` is installed as a distribution."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def repair() -> list[str]:
    """Repair what is broken; return a description of each repair, [] if nothing was broken.

    Raises:
        UserError: these repairs are not enough.
    """
    if not is_cpu_torch():
        return []
    return _remove_sound_and_video() + _hook_torchvision()


def _remove_sound_and_video() -> list[str]:
    broken = [package for package in ("torchaudio", "torchcodec") if installed(package) and not imports(package)]
    if not broken:
        return []
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{sys.prefix}: {' and '.join(broken)} do not load, and this environment has no pip: uninstall them by hand"
        )
    subprocess.run([sys.executable, "-P", "-m", "pip", "uninstall", "--quiet", "--yes", *broken], check=True)
    return [f"uninstalled {' and '.join(broken)} (CUDA builds with a CPU torch)"]


def _hook_torchvision() -> list[str]:
    site = Path(sysconfig.get_paths()["purelib"])
    hook = site / f"{HOOK}.py"
    outdated = hook.is_file() and hook.read_text(encoding="utf-8") != HOOK_SOURCE
    if not outdated and (not installed("torchvision") or imports("torchvision")):
        return []
    hook.write_text(HOOK_SOURCE, encoding="utf-8")
    hook.with_suffix(".pth").write_text(f"import {HOOK}\n", encoding="utf-8")
    if not imports("torchvision"):
        raise UserError(
            f"torchvision does not import, even with the hook in {hook}: see `{sys.executable} -c 'import torchvision'`"
        )
    return [f"{'renewed' if outdated else 'added'} the import hook for torchvision (a CUDA build with a CPU torch)"]


if __name__ == "__main__":
    console = Console(highlight=False)
    try:
        for line in repair():
            console.print(f"repaired: {line}", markup=False, soft_wrap=True)
    except UserError as error:
        sys.exit(str(error))
