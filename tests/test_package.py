"""The package declares its dependencies, the pinned set contains them, and the wheel contains the catalogue."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CATALOGUE = ("modalities", "teachers", "data", "eval", "recipes")


def requirements(*extras: str) -> dict[str, Requirement]:
    """Return the declared requirements by name: those of the package, and those of its extras."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements/cpu.txt").read_text(encoding="utf-8").splitlines()
    return {
        canonicalize_name(name): version
        for name, version in (line.split("==") for line in lines if not line.startswith("#"))
    }


def imported(*folders: str) -> set[str]:
    """Return the top-level modules that the code in folders of the repository imports."""
    names: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_what_the_package_imports_it_declares():
    owners = importlib.metadata.packages_distributions()
    used = imported("mmopd", *CATALOGUE) - set(sys.stdlib_module_names) - {"mmopd"}
    declared = requirements("vllm-cpu", "eval", "hub").keys()
    undeclared = {name for name in used if not {canonicalize_name(owner) for owner in owners.get(name, [])} & declared}
    assert undeclared == set()


def test_the_pinned_set_fits_what_is_declared():
    pinned = pins()
    for name, requirement in requirements("vllm-cpu", "eval", "hub", "dev").items():
        assert requirement.specifier.contains(pinned[name]), f"{requirement}, pinned {pinned[name]}"


def test_the_pinned_set_has_no_place_or_build_of_this_machine():
    lines = [
        line
        for line in (ROOT / "requirements/cpu.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+]+", line)] == []
    assert {version.partition("+")[2] for version in pins().values()} == {"", "cpu"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(out),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_the_catalogue_and_no_leftovers(wheel):
    names = set(wheel.namelist())
    for folder in CATALOGUE:
        files = {
            path.relative_to(ROOT)
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert {f"mmopd/_catalog/{path}" for path in files} <= names
    assert [name for name in names if "__pycache__" in name] == []
    assert not {name.partition("/")[0] for name in names} - {
        "mmopd",
        f"mmopd-{importlib.metadata.version('mmopd')}.dist-info",
    }


def test_vllm_finds_the_weight_sync_and_the_shell_the_command():
    points = {(point.group, point.value) for point in importlib.metadata.distribution("mmopd").entry_points}
    assert points == {
        ("console_scripts", "mmopd.cli:main"),
        ("vllm.general_plugins", "mmopd.rollout.vllm_plugin:register"),
    }
