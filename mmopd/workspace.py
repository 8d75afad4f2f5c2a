"""Files of the workspace (the current folder, or another that is given), and those that came with the package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import mmopd
from mmopd import settings_file
from mmopd.errors import ConfigError


def shipped() -> Path:
    """The folder with the shipped catalogue: inside the package if it was installed, above it in a source checkout."""
    package = Path(mmopd.__file__).parent
    installed = package / "_catalog"
    return installed if installed.is_dir() else package.parent


def find(name: str | Path, workspace: Path | None = None) -> Path:
    """The file that `KIND/NAME` stands for, or any other path if it exists.

    Raises:
        UserError: there is no such file; names what there is.
    """
    roots = (workspace or Path.cwd(), shipped())
    for root in roots:
        if (path := root / name).is_file():  # an absolute name is itself
            return path
    kind = Path(name).parent
    suffix = Path(name).suffix
    known = {str(kind / path.name) for root in roots for path in (root / kind).glob(f"*{suffix}")}
    raise ConfigError(f"{name}: no such file in {roots[0]}, nor is it shipped{settings_file.suggest(str(name), known)}")


def load_module(path: Path) -> ModuleType:
    """Run a `.py` of the catalogue, which is no package.

    Raises:
        UserError: it raises; names the file and the line.
    """
    name = f"mmopd_catalog_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        line = 0
        trace = error.__traceback__
        while trace is not None:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == str(path) else line
            trace = trace.tb_next
        raise ConfigError(f"{path}{f':{line}' if line else ''}: {type(error).__name__}: {error}") from error
    return module
