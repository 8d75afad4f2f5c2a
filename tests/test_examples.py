"""The files of examples/ run as they are; the one that asks a server is given one that answers like vLLM."""

import asyncio
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest
from fake_vllm import FakeVLLM
from scoring import processor_encoder
from test_report import write_run

from mmopd.demo.world import build_processor
from mmopd.serving import endpoint

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """Return a function that runs an example in an empty folder, and returns the lines that it prints."""
    monkeypatch.chdir(tmp_path)

    def start(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return start


def test_opd_on_tensors_turns_the_order_of_a_group_round(run: Callable[..., list[str]]) -> None:
    lines = run("opd_on_tensors.py")
    assert len(lines) == 7
    assert lines[-1] == "groups in the right order: 50% before the margin shift, 100% after"


def test_a_custom_view_shows_each_teacher_another_prompt(run: Callable[..., list[str]], tmp_path: Path) -> None:
    build_processor().save_pretrained(tmp_path / "student")
    vision, _, words, described, tutor, hinted = run("custom_view.py", "student")
    assert [line.partition(",")[0] for line in (vision, words, tutor)] == [
        "vision: 1 images",
        "words: 0 images",
        "tutor: 1 images",
    ]
    assert "[picture: a three and a five]" in described
    assert "Hint: Three and five." in hinted


def test_a_response_is_scored_token_by_token(run: Callable[..., list[str]], tmp_path: Path) -> None:
    encoder = processor_encoder(tmp_path / "student")

    async def score() -> list[str]:
        async with FakeVLLM(encoder) as server:
            names = ("text_teacher.0", "image_teacher.0")
            endpoint.save(tmp_path / "endpoints.json", [replace(server.endpoint, name=name) for name in names])
            return await asyncio.to_thread(run, "score_response.py", "teachers/demo.yaml", "endpoints.json", "student")

    total, *tokens = asyncio.run(score())
    assert total.startswith("text_teacher: -")
    assert [line.split()[1] for line in tokens] == ["'4'", "'2'", "'<|im_end|>'"]


def test_samples_are_read_without_mmopd(run: Callable[..., list[str]], tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one")
    lines = run("read_samples.py")
    assert lines[0].startswith("digit_sum: 2 responses at steps [")
    assert len(lines) == 8
    assert "mmopd" not in (EXAMPLES / "read_samples.py").read_text(encoding="utf-8")


def test_the_notebook_of_a_demo_runs_from_its_first_cell_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    write_run(tmp_path / "runs" / "demo-1")
    book = json.loads((EXAMPLES / "demo_run.ipynb").read_text(encoding="utf-8"))
    assert (book["nbformat"], len({cell["id"] for cell in book["cells"]})) == (4, len(book["cells"]))
    names: dict[str, object] = {}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec("".join(cell["source"]), names)
    assert "distilled" in capsys.readouterr().out
    figure, plt = names["figure"], names["plt"]
    assert figure.axes[1].patches  # type: ignore[attr-defined]
    plt.close("all")  # type: ignore[attr-defined]


def test_every_example_is_in_the_table() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".ipynb"}}
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert {name for name in files if f"]({name})" in page} == files
