"""A row that breaks one prompt is found when it is written, indexed or shown, and costs a run nothing else."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmopd.cli import app
from mmopd.errors import DataError
from mmopd.modality.registry import check_items
from mmopd.prompts import Shards, index_tar, write_shards
from mmopd.records import Prompt
from mmopd.task.base import user_turn


def photo(form: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


WHOLE = photo()
HALF = WHOLE[: len(WHOLE) // 2] + bytes(len(WHOLE) - len(WHOLE) // 2)  # of the same length


def shown(key: str, image: bytes) -> Prompt:
    return Prompt(key, "digit_sum", "image", tuple(user_turn("Their sum?", 1)), (image,), "1")


def damaged(folder: Path, rows: int = 4, bad: int = 2) -> Path:
    """Write a source, damage the image of one row, and return the tar."""
    write_shards([shown(str(i), WHOLE) for i in range(rows)], folder)
    (tar,) = folder.glob("*.tar")
    content = bytearray(tar.read_bytes())
    at = -1
    for _ in range(bad + 1):
        at = content.index(WHOLE, at + 1)
    content[at : at + len(HALF)] = HALF
    tar.write_bytes(content)
    return tar


def test_half_an_image_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1 \(b\): image 0: its pixels cannot be read"):
        write_shards([shown("a", WHOLE), shown("b", HALF)], tmp_path / "s")


def test_half_an_image_is_found_by_an_index_that_decodes(tmp_path: Path) -> None:
    tar = damaged(tmp_path / "s")
    index_tar(tar)
    assert len(Shards(tmp_path / "s")) == 4
    with pytest.raises(DataError, match=r"row '00000002': .*its pixels cannot be read"):
        CliRunner().invoke(app, ["index", str(tmp_path / "s"), "--decode"], catch_exceptions=False)


def test_half_an_image_is_named_when_a_prompt_is_about_to_be_asked() -> None:
    check_items(shown("s/0", WHOLE))
    with pytest.raises(ValueError, match=r"s/1: image: its pixels cannot be read"):
        check_items(shown("s/1", HALF))
