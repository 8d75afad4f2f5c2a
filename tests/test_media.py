"""A new medium is one file and one line: a toy medium goes from a row to a micro-batch without any other change."""

import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from clips import frame
from test_modality import png

from mmopd.config import View
from mmopd.modality import Encoder
from mmopd.modality.image import ImageMedium
from mmopd.modality.registry import MEDIA
from mmopd.prompts import TokenCounter, write_shards
from mmopd.prompts.rows import RowError, pack
from mmopd.records import Encoded, Prompt, Response, Sample, Score
from mmopd.report.heatmap import token_row
from mmopd.serving import wire
from mmopd.task import Task, verify
from mmopd.teacher.view import BUILT_IN, encode_view
from mmopd.train.pack import Collator
from mmopd.train.prefix_tree import Item
from mmopd.train.students import load_student

TOKENS = (5, 6, 7)
SKETCHES = (frame(70, 50, 3), frame(64, 32, 9))


class SketchMedium(ImageMedium):
    """Drawings: stored under their own names, and sent to the model as images."""

    name: ClassVar[str] = "sketch"
    item: ClassVar[str] = "sketch"
    items: ClassVar[str] = "sketches"
    pattern: ClassVar[str] = r"sketch(?P<item>\d+)\.(?P<file>0)\.\w+"
    member_form: ClassVar[str] = "sketchNUMBER.0.FORMAT"
    counts: ClassVar[str | None] = "sketches"

    def member(self, item: int, file: int) -> str:
        return f"sketch{item}.{file}"


@pytest.fixture(autouse=True)
def sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MEDIA, "sketch", SketchMedium())  # the line in the registry


def ask(name: str, files: tuple[bytes, ...]) -> Prompt:
    """Return a question about files, each an item of the medium `name`."""
    parts = [{"type": name}] * len(files)
    messages = ({"role": "user", "content": [*parts, {"type": "text", "text": "What is it?"}]},)
    images = files if name == "image" else ()
    others = {} if name == "image" else {name: tuple((file,) for file in files)}
    return Prompt(f"{name}/0", "drawn", name, messages, images, "a cat", {}, others)


@pytest.fixture
def drawn(encoder: Encoder) -> Encoded:
    return encoder.encode(ask("sketch", SKETCHES))


@pytest.fixture
def pictured(encoder: Encoder) -> Encoded:
    """Return the prompt with the same files as images."""
    return encoder.encode(ask("image", SKETCHES))


def test_rows_of_a_new_medium_are_stored_indexed_and_counted(
    tmp_path: Path, model: Path, drawn: Encoded, pictured: Encoded
) -> None:
    rows = [drawn.prompt, pictured.prompt]
    shards = write_shards(rows, tmp_path / "s", counter=TokenCounter(model))
    (tar,) = tmp_path.glob("s/*.tar")
    with tarfile.open(tar) as archive:
        names = archive.getnames()
        row = json.loads(archive.extractfile(names[0]).read())  # type: ignore[union-attr]
    assert names[:3] == ["00000000.json", "00000000.sketch0.0.png", "00000000.sketch1.0.png"]
    assert row["sketches"] == [1, 1]
    for before, after in zip(rows, shards, strict=True):
        assert replace(after, key=before.key) == before
    assert shards.kinds == {("drawn", "sketch"): 1, ("drawn", "image"): 1}
    assert shards.image_sizes(0) == shards.image_sizes(1) == [(70, 50), (64, 32)]
    assert [shards.tokens(i) for i in range(2)] == [len(drawn.expanded)] * 2


def test_rows_of_a_new_medium_are_checked_as_others_are(drawn: Encoded) -> None:
    for row, message in (
        (drawn.prompt.with_items("sketch", [(SKETCHES[0],)]), "2 sketch parts in its messages, and 1 sketches"),
        (replace(drawn.prompt, modality="image"), "2 sketches, and its modality is 'image'"),
        (drawn.prompt.with_items("sketch", [(b"no image",)] * 2), "sketch 0: not an image"),
        (replace(drawn.prompt, others={"song": ((b"la",),)}), "it has 'song'; known media are image, video, sketch"),
    ):
        with pytest.raises(RowError, match=message):
            pack(row)


def test_a_task_makes_rows_of_a_new_medium(drawn: Encoded) -> None:
    messages = drawn.prompt.messages
    task = Task("drawn", "sketch", messages=lambda question, n: messages)
    given = {"sketch": [[sketch] for sketch in SKETCHES]}
    assert task.prompt("sketch/0", "What is it?", "a cat", others=given) == drawn.prompt


def test_a_new_medium_becomes_the_ids_grids_and_pixels_of_the_input_that_it_goes_into(
    encoder: Encoder, drawn: Encoded, pictured: Encoded
) -> None:
    assert (drawn.ids, drawn.expanded, drawn.grids) == (pictured.ids, pictured.expanded, pictured.grids)
    for ours, theirs in zip(encoder.pixel_values(drawn), encoder.pixel_values(pictured), strict=True):
        assert ours.equal(theirs)


def test_two_media_with_one_placeholder_do_not_mix_in_a_prompt(encoder: Encoder, drawn: Encoded) -> None:
    with pytest.raises(ValueError, match="images and sketches in one prompt share a placeholder"):
        encoder.encode(replace(drawn.prompt, images=(png(64, 32),)))


def test_a_new_medium_is_sent_as_the_input_that_it_goes_into(drawn: Encoded, pictured: Encoded) -> None:
    ours, theirs = (json.loads(wire.scoring_body("tiny", one, TOKENS)) for one in (drawn, pictured))
    assert ours == theirs
    assert [part["type"] for part in ours["content_parts"]] == ["image_url"] * 2


def test_a_new_medium_is_packed_for_the_trainer(
    model: Path, encoder: Encoder, drawn: Encoded, pictured: Encoded
) -> None:
    student = load_student(model, torch.float32)
    collate = Collator(encoder, student.model.get_rope_index, 3 * 2 * 16 * 16, 2, "masked")
    ours, theirs = (collate([Item.to_score(one, TOKENS)], [0]) for one in (drawn, pictured))
    assert ours.inputs["media_index"] == {"image": [0, 1], "video": []}
    with torch.no_grad():
        assert student(**ours.inputs).equal(student(**theirs.inputs))


def test_views_and_the_report_show_a_new_medium(encoder: Encoder, drawn: Encoded) -> None:
    blank = encode_view(encoder, drawn, BUILT_IN["blank"])
    assert blank.expanded == drawn.expanded
    assert encoder.pixel_values(blank)[0].unique().numel() == 1
    assert not encode_view(encoder, drawn, BUILT_IN["text"]).prompt.is_visual
    assert len(encode_view(encoder, drawn, View(max_pixels=1024)).expanded) < len(drawn.expanded)
    sample = Sample(0, Response((5,), (-1.0,), "B", "stop", (("0", 1),)), verify.RIGHT, Score("t", (-1.0,)))
    assert len(token_row(0, drawn.prompt, sample, ["B"], [0.0], kept=True).images) == 2
