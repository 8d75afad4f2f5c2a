"""`mmopd show data/MIX.yaml`: shares, rows, tokens, images and epochs, from the indices alone."""

import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmopd.cli import app
from mmopd.demo import world
from mmopd.prompts import TokenCounter, write_shards
from mmopd.records import Prompt

MIXTURE = """
sources:
  sums: {shards: sums, task: additions, weight: 1, max_prompt_tokens: LIMIT, schedule: {100: 4}}
  digits: {shards: digits, task: digit_sum, weight: 3}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    world.build_processor().save_pretrained(tmp_path / "student")
    counter = TokenCounter(tmp_path / "student")
    sums = world.additions("few", 20, 0)
    sums[3]["messages"][0]["content"][0]["text"] *= 50
    rows = [Prompt("", "additions", "text", tuple(row["messages"]), (), row["answer"]) for row in sums]
    write_shards(rows, tmp_path / "sums", counter=counter)
    digits = world.digit_sums("few", 30, 0)
    images = [
        Prompt("", "digit_sum", "image", tuple(row["messages"]), tuple(row["images"]), row["answer"]) for row in digits
    ]
    write_shards(images, tmp_path / "digits", counter=counter, max_rows=8)
    limit = max(sum(counter(row)) for i, row in enumerate(rows) if i != 3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(MIXTURE.replace("LIMIT", str(limit)), encoding="utf-8")
    return tmp_path


def shown(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["show", *arguments], catch_exceptions=False)
    return re.sub(r"\s+", " ", done.output)


def test_the_tree_says_what_is_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", None)  # only indices may be read
    for tar in here.glob("*/*.tar"):
        tar.chmod(0o000)
    text = shown("data/mine.yaml")
    assert "49 rows" in text
    assert "30 images; in 40 prompts" in text
    assert "sums 25.0% of the prompts, 0.53 epochs; 19 rows" in text
    assert "digits 75.0% of the prompts, 1.00 epochs; 30 rows" in text
    assert "60 of images), 30 images" in text  # 32 x 64 pixels are two tokens
    assert "task digit_sum (image): 30 rows" in text
    assert "weight 1 at step 0, 4 at step 100" in text
    assert re.search(r"left out: 1 rows over \d+ tokens", text)
    assert "digits 75.0% of the prompts, 25.00 epochs" in shown("data/mine.yaml", "--prompts", "1000")


def test_a_recipe_is_still_shown(here: Path) -> None:
    assert "log_ratio_clip: 10.0" in shown("recipes/demo.yaml")


def test_an_index_is_made_for_another_student(here: Path) -> None:
    from mmopd.prompts import Shards

    CliRunner().invoke(app, ["index", "sums"], catch_exceptions=False)
    assert Shards(Path("sums")).processor is None
    CliRunner().invoke(app, ["index", "sums", "--processor", "student"], catch_exceptions=False)
    assert Shards(Path("sums")).processor == TokenCounter(Path("student")).processor
