"""Make a CPU environment importable: `python -m mmopd.repair` (does nothing where nothing is broken).

On the package index, torchvision, torchaudio and torchcodec are CUDA builds. Beside the CPU build of torch none of
them loads. The last two are not needed and are uninstalled, since vLLM fails on their presence. Of torchvision only
the Python code is needed, so an import hook defines the two operators whose absence stops it. The hook is a `.pth`
file, because vLLM's spawned workers must see it too; it stands aside where torchvision's own operators load.
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
HOOK_SOURCE = '''"""Written by `python -m mmopd.repair`: defines two operators that a CUDA torchvision cannot load beside a CPU torch."""

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
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # there already
            pass


sys.meta_path.insert(0, _Finder())
'''


def is_cpu_torch() -> bool:
    """Whether the installed torch is a CPU build (its version says so)."""
    return installed("torch") and importlib.metadata.version("torch").endswith("+cpu")


def imports(module: str) -> bool:
    """Whether `module` imports in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", f"import {module}"], check=False, capture_output=True).returncode == 0


def torchvision_loads() -> bool:
    """Whether torchvision imports, as far as its files say; a real import takes seconds.

    Its operators do not load where they were built for CUDA and torch was not, and then it does not import without the
    hook.
    """
    site = importlib.metadata.distribution("torchvision").locate_file("")
    libraries = list(Path(str(site), "torchvision").glob("_C*.so"))
    wants_cuda = any(b"libtorch_cuda.so" in library.read_bytes() for library in libraries)
    return not wants_cuda or not is_cpu_torch() or importlib.util.find_spec(HOOK) is not None


def installed(package: str) -> bool:
    """Whether `package` is installed as a distribution."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def repair() -> list[str]:
    """Repair what is broken and say what was done; [] where nothing was.

    Raises:
        UserError: it is broken beyond these repairs.
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
            f"{sys.prefix}: {' and '.join(broken)} do not load, and there is no pip here to uninstall them: do it by hand"
        )
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *broken], check=True)
    return [f"uninstalled {' and '.join(broken)} (CUDA builds beside a CPU torch)"]


def _hook_torchvision() -> list[str]:
    site = Path(sysconfig.get_paths()["purelib"])
    hook = site / f"{HOOK}.py"
    outdated = hook.is_file() and hook.read_text() != HOOK_SOURCE
    if not outdated and (not installed("torchvision") or imports("torchvision")):
        return []
    hook.write_text(HOOK_SOURCE)
    hook.with_suffix(".pth").write_text(f"import {HOOK}\n")
    if not imports("torchvision"):
        raise UserError(
            f"torchvision does not import, even with the hook in {hook}: see `{sys.executable} -c 'import torchvision'`"
        )
    return [f"{'renewed' if outdated else 'added'} the import hook for torchvision (a CUDA build beside a CPU torch)"]


if __name__ == "__main__":
    console = Console(highlight=False)
    try:
        for line in repair():
            console.print(f"repaired: {line}", markup=False, soft_wrap=True)
    except UserError as error:
        sys.exit(str(error))
