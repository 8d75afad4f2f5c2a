import subprocess
import sys
from pathlib import Path

import pytest

from mmopd import repair
from mmopd.errors import UserError

# The real torchvision at import: load its operators if possible, then add to their schemas.
FAKE_TORCHVISION = """
import torch
from pathlib import Path
try:
    torch.ops.load_library(Path(__file__).parent / "_C.so")
except OSError:
    pass
torch.library.register_fake("torchvision::nms", lambda dets, scores, iou_threshold: None)
"""
# A hook of this environment must not help the hook under test.
WITHOUT_SITE_HOOK = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != '_Finder']; "


def run(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_SITE_HOOK + f"sys.path.insert(0, {str(folder)!r}); " + code]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)


@pytest.fixture
def broken_torchvision(tmp_path: Path) -> Path:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE_TORCHVISION, encoding="utf-8")
    (package / "_C.so").write_bytes(b"not a library for this torch")
    (tmp_path / "hook_under_test.py").write_text(repair.HOOK_SOURCE, encoding="utf-8")
    return tmp_path


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Return an environment whose packages import or not as the dict says; every key of the dict is installed."""
    works: dict[str, bool] = {}
    monkeypatch.setattr(repair, "is_cpu_torch", lambda: True)
    monkeypatch.setattr(repair, "installed", works.__contains__)
    monkeypatch.setattr(repair, "imports", lambda module: works[module] or (tmp_path / f"{repair.HOOK}.pth").is_file())
    monkeypatch.setattr(repair.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    return works


def test_the_hook_lets_a_torchvision_without_its_operators_import(broken_torchvision):
    assert "torchvision::nms" in run(broken_torchvision, "import torchvision").stderr
    done = run(
        broken_torchvision, "import hook_under_test, torchvision, torch; print(torch.ops.torchvision.nms.default)"
    )
    assert done.stdout == "torchvision.nms.default\n", done.stderr


def test_the_hook_goes_after_the_first_import_and_leaves_other_modules_alone(broken_torchvision):
    code = "import hook_under_test; n = len(sys.meta_path); import wave, torchvision; print(n - len(sys.meta_path))"
    done = run(broken_torchvision, code)
    assert done.stdout == "1\n", done.stderr


def test_an_environment_that_works_is_left_alone(environment, tmp_path):
    environment.update(torchvision=True, torchaudio=True, torchcodec=True)
    assert repair.repair() == []
    assert list(tmp_path.iterdir()) == []


def test_a_cuda_torch_is_none_of_our_business(environment, tmp_path, monkeypatch):
    environment.update(torchvision=False, torchaudio=False)
    monkeypatch.setattr(repair, "is_cpu_torch", lambda: False)
    assert repair.repair() == []
    assert list(tmp_path.iterdir()) == []


def test_a_torchvision_that_does_not_import_gets_the_hook_once(environment, tmp_path):
    environment.update(torchvision=False)
    assert len(repair.repair()) == 1
    assert (tmp_path / f"{repair.HOOK}.pth").read_text(encoding="utf-8") == f"import {repair.HOOK}\n"
    assert (tmp_path / f"{repair.HOOK}.py").read_text(encoding="utf-8") == repair.HOOK_SOURCE
    assert repair.repair() == []


def test_an_older_hook_is_renewed(environment, tmp_path):
    environment.update(torchvision=True)
    (tmp_path / f"{repair.HOOK}.py").write_text("# of an earlier version", encoding="utf-8")
    assert "renewed" in repair.repair()[0]
    assert (tmp_path / f"{repair.HOOK}.py").read_text(encoding="utf-8") == repair.HOOK_SOURCE


def test_only_what_does_not_import_is_uninstalled(environment, monkeypatch):
    commands: list[list[str]] = []
    environment.update(torchvision=True, torchaudio=False, torchcodec=True)
    monkeypatch.setattr(repair.subprocess, "run", lambda command, **_: commands.append(command))
    assert "torchaudio" in repair.repair()[0]
    assert commands == [[sys.executable, "-P", "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio"]]


def test_without_pip_it_says_what_to_uninstall(environment, monkeypatch):
    environment.update(torchcodec=False)
    monkeypatch.setattr(repair.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="torchcodec"):
        repair.repair()


def test_this_environment_needs_no_repair():
    assert repair.imports("torchvision")
