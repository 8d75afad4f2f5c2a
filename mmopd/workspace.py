"""Files of the workspace (the current folder, or a given one), and the files shipped with the package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import mmopd
from mmopd.errors import ConfigError
from mmopd.settings_errors import shortened, suggest


def shipped() -> Path:
    """Return the folder of the shipped catalogue: inside the installed package, or above it in a source checkout."""
    package = Path(mmopd.__file__).parent
    installed = package / "_catalog"
    return installed if installed.is_dir() else package.parent


def find(name: str | Path, workspace: Path | None = None, key: str = "") -> Path:
    """Return the file for `KIND/NAME`, or for any other path that exists.

    Args:
        name: the name.
        workspace: the workspace, if not the current folder.
        key: the setting that has this name, for the message.

    Raises:
        ConfigError: there is no such file; the message suggests a known name.
    """
    roots = (workspace or Path.cwd(), shipped())
    for root in roots:
        if is_file(path := root / name):  # an absolute name replaces the root
            return path
    where = f"{key}: " if key else ""
    if is_folder(folder := roots[0] / name):
        inside = f": `{name}/recipe.yaml` is the recipe of this run" if (folder / "recipe.yaml").is_file() else ""
        raise ConfigError(f"{where}{name}: this is a folder; give a file{inside}")
    known = names(Path(name).parent, Path(name).suffix, workspace)
    shown = shortened(str(name))
    raise ConfigError(f"{where}{shown}: no such file in {roots[0]}, nor is it shipped{suggest(shown, known)}")


def is_file(path: Path) -> bool:
    """Return true for a file; false also for a name that is too long for one."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Return true for a folder; false also for a name that is too long for one."""
    try:
        return path.is_dir()
    except OSError:
        return False


def names(kind: str | Path, suffix: str = ".yaml", workspace: Path | None = None) -> list[str]:
    """Return `KIND/NAME` of the files of a kind, those of the workspace and the shipped ones; of all without suffix."""
    roots = (workspace or Path.cwd(), shipped())
    files = [path for root in roots if is_folder(root / kind) for path in (root / kind).glob("*") if path.is_file()]
    return sorted({str(Path(kind, path.name)) for path in files if suffix in ("", path.suffix)})


def load_module(path: Path) -> ModuleType:
    """Run a `.py` file of the catalogue, which is not a package.

    Raises:
        ConfigError: the file raises an exception; the message names the file and the line.
    """
    name = f"mmopd_catalog_{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module
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
