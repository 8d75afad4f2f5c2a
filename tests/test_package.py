"""The package declares its dependencies, the pinned set contains them, and sdist and wheel contain the catalogue."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mmopd

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SERVICES = ("wandb", "trackio", "mlflow")  # loggers; the pinned set has the first
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
    declared = requirements("vllm-cpu", "eval", "hub", *SERVICES).keys()
    undeclared = {name for name in used if not {canonicalize_name(o) for o in owners.get(name, [name])} & declared}
    assert undeclared == set()


def test_the_pinned_set_fits_what_is_declared():
    pinned = pins()
    for name, requirement in requirements("vllm-cpu", "eval", "hub", "wandb", "dev").items():
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
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an unpacked source distribution."""
    out = tmp_path_factory.mktemp("sdist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(out)], cwd=ROOT, check=True)
    with tarfile.open(next(out.glob("*.tar.gz"))) as tar:
        tar.extractall(out, filter="data")
    return next(path for path in out.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> zipfile.ZipFile:
    """Return the wheel that is built from the source distribution, as a package index would have it."""
    out = sdist.parent / "wheel"
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=sdist, check=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def files(*folders: str) -> set[str]:
    """Return the files of folders of the repository, without what a run or an import leaves there."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in found if "__pycache__" not in path.parts}


def test_the_sdist_holds_what_builds_tests_and_documents_the_package(sdist: Path) -> None:
    names = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    single = {"README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "CITATION.cff", "Makefile", "mkdocs.yml"}
    assert single | files("mmopd", *CATALOGUE, "docs", "examples", "requirements", "tests", "benchmarks") <= names
    assert [name for name in names if "__pycache__" in name or name.startswith((".venv", "site/", "runs/"))] == []


def test_the_wheel_holds_the_catalogue_and_no_leftovers(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {f"mmopd/_catalog/{file}" for file in files(*CATALOGUE)} | files("mmopd") <= names
    assert "mmopd/py.typed" in names
    assert [name for name in names if "__pycache__" in name] == []
    assert {name.partition("/")[0] for name in names} == {"mmopd", f"mmopd-{mmopd.__version__}.dist-info"}


def test_the_wheel_answers_in_an_empty_folder(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    wheel.extractall(installed)  # what pip does with a wheel of Python files
    empty = tmp_path / "empty"
    empty.mkdir()

    def answer(*command: str) -> str:
        env = os.environ | {"PYTHONPATH": str(installed)}
        done = subprocess.run(
            [sys.executable, "-P", *command],
            cwd=empty,
            env=env,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert answer("-c", "import mmopd; print(mmopd.__file__)").strip() == str(installed / "mmopd" / "__init__.py")
    assert answer("-m", "mmopd", "--version").strip() == mmopd.__version__
    shown = json.loads(answer("-m", "mmopd", "show", "recipes/demo.yaml", "--json"))
    assert [row["teacher"] for row in shown["teachers"]] == ["text_teacher", "image_teacher"]
    assert list(empty.iterdir()) == []
    answer("-m", "mmopd", "init", ".")
    assert {path.name for path in empty.iterdir()} == {*CATALOGUE}
    answer("-m", "mmopd", "new", "objective", "mine")
    assert "Mine" in answer("-m", "mmopd", "show", "algorithm/mine.py")


def test_the_versions_of_the_project_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mmopd.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    released = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert not released or released[0] == mmopd.__version__


def test_public_ci_runs_on_every_python_that_is_claimed() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    claimed = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == claimed
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(claimed[0])


def test_vllm_finds_the_weight_sync_and_the_shell_the_command():
    points = {(point.group, point.value) for point in importlib.metadata.distribution("mmopd").entry_points}
    assert points == {
        ("console_scripts", "mmopd.cli:main"),
        ("vllm.general_plugins", "mmopd.rollout.vllm_plugin:register"),
    }
