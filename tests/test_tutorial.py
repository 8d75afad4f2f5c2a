"""docs/adding-a-task.md: every block of the page is saved or run unchanged, in order."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT

PAGE = Path(__file__).parents[1] / "docs" / "adding-a-task.md"
BLOCK = re.compile(r"^```(python|yaml|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def steps(page: str) -> list[tuple[str, str]]:
    """Return (name of the file to save, its text) or ("", command), in the order of the page."""
    found = []
    for block in BLOCK.finditer(page):
        language, text = block.groups()
        if language == "bash":
            found += [("", line) for line in text.splitlines()]
        else:
            found.append((re.findall(r"[Ss]ave this as\s+`([^`]+)`", page[: block.start()])[-1], text))
    return found


@pytest.fixture
def place(workspace: Path, tmp_path: Path) -> Path:
    """Return the reader's workspace, after the demo."""
    shutil.copytree(workspace / ".mmopd", tmp_path / "work" / ".mmopd")
    return tmp_path / "work"


def test_the_page_saves_each_file_once_and_runs_what_it_saves():
    names = [name for name, _ in steps(PAGE.read_text(encoding="utf-8")) if name]
    assert names == ["draw_dots.py", "modalities/count_dots.py", "check_dots.py", "data/dots.yaml", "recipes/dots.yaml"]
    assert sum(not name for name, _ in steps(PAGE.read_text(encoding="utf-8"))) == 6


@pytest.mark.usefixtures("server")
def test_a_reader_who_does_what_the_page_says_gets_there(place):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    printed = []
    for name, text in steps(PAGE.read_text(encoding="utf-8")):
        if name:
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text(text, encoding="utf-8")
            continue
        done = subprocess.run(
            shlex.split(text),
            cwd=place,
            env=env,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
            encoding="utf-8",
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        printed.append(done.stdout)
    assert len(list((place / "shards" / "dots").glob("*.tar"))) == 1
    tree, plan = printed[3], printed[4]
    assert "200" in tree
    assert "count_dots (image)" in plan
    run = place / "runs" / "dots"
    assert '"accuracy/count_dots"' in (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert "count_dots" in (run / "report.html").read_text(encoding="utf-8")
