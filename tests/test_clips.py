"""Clips without a server: shards, bounds, ids and pixels, packing, views."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from clips import MIXED, QUESTION, SHAPES, clip, frame, of_transformers, prompt, write_films
from PIL import Image
from student_worker import build
from transformers.video_utils import VideoMetadata

from mmopd.config import View
from mmopd.demo.world import build_processor
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.modality.video import FPS, MAX_FRAMES
from mmopd.prompts import PromptPlan, Rows, Shards, TokenCounter, write_shards
from mmopd.prompts.index import index_tar
from mmopd.prompts.rows import RowError, pack
from mmopd.records import Encoded, Prompt, Response, Sample, Score
from mmopd.report.heatmap import token_row
from mmopd.task import verify
from mmopd.task.load import load_tasks
from mmopd.teacher.view import BUILT_IN, ViewError, encode_view
from mmopd.train.pack import Collator
from mmopd.train.prefix_tree import Item
from mmopd.train.students import layout, load_student

TOKENS = (5, 6, 7, 8)
RESPONSE = Response((5,), (-1.0,), "B", "stop", (("0", 1),))


@pytest.fixture(scope="module")
def encoded(encoder: Encoder) -> dict[str, Encoded]:
    return {name: encoder.encode(one) for name, one in MIXED.items()}


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Shards:
    return write_films(tmp_path_factory.mktemp("films"), model)


def test_clips_go_into_shards_and_come_back_frame_by_frame(films: Shards, encoder: Encoder) -> None:
    assert films.kinds == {("video_choice", "video"): 4}
    assert [len(row.items("video")[0]) for row in films] == [4, 5, 6, 7]
    assert [row.answer for row in films] == ["B", "A", "B", "A"]
    assert films[0].items("video")[0] != films[1].items("video")[0][:4]
    assert films.image_sizes(2) == [(64, 32)] * 6
    totals = films.totals()
    assert (totals.rows, totals.images) == (4, 4 + 5 + 6 + 7)
    for i, row in enumerate(films):
        assert films.tokens(i) == len(encoder.encode(row).expanded)
    drawn = PromptPlan({"films": Rows(len(films), films.fingerprint)}, {"films": 1.0}, 0).draw(8)
    assert sorted(films[row].key for _, row in drawn) == sorted(2 * [f"shards/{i}" for i in range(4)])


def test_a_long_clip_is_left_out_by_its_tokens(films: Shards) -> None:
    limit = films.tokens(2)
    assert limit is not None
    assert [len(row.items("video")[0]) for row in films.filtered(limit)] == [4, 5, 6]


def test_images_and_clips_of_one_row_keep_their_places(tmp_path: Path, model: Path) -> None:
    rows = [MIXED["two clips"], MIXED["image"], MIXED["an image and a clip"], MIXED["text"]]
    shards = write_shards(rows, tmp_path / "s", counter=TokenCounter(model))
    for row, back in zip(rows, shards, strict=True):
        assert (back.others, back.images, back.messages) == (row.others, row.images, row.messages)
    (tar,) = tmp_path.glob("s/*.tar")
    with tarfile.open(tar) as archive:
        names = archive.getnames()
    assert {"00000000.clip0.002.png", "00000000.clip1.000.png", "00000002.0.png", "00000002.clip0.000.png"} <= set(
        names
    )
    library = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    assert library[0]["clip1.003.png"] == rows[0].items("video")[1][3]


ASKED = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"clip0.000.png": 0, "clip0.002.png": 2}, "frames from 0 on"),
        ({"clip1.000.png": 0, "clip1.001.png": 1}, "frames from 0 on"),
        ({"clip0.000.png": 0, "clip0.0.png": 1}, "occurs twice"),
        ({"clip.000.png": 0}, "neither KEY.json"),
        (
            {"clip0.000.png": 0, "clip0.001.png": 1, "clip0.002.png": 2},
            "0 image parts in its messages, and 1 images",
        ),
        ({"0.png": 0, "1.png": 1}, r"says that its clips have \[2\] frames, and its members are \[\]"),
        ({"clip0.000.png": 0}, "1 files, and its json says 2 frames"),
        ({"clip0.000.png": 0, "clip0.001.png": 3}, "frame 1 has 32 x 32 pixels, and frame 0 64 x 32"),
    ],
)
def test_a_tar_whose_frames_do_not_fit_gets_no_index(tmp_path: Path, members: dict[str, int], message: str) -> None:
    frames = [*clip(3), frame(32, 32, 0)]
    row = json.dumps({"task": "t", "modality": "video", "messages": ASKED, "answer": "1", "frames": [2]}).encode()
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        for name, content in {"json": row, **{name: frames[i] for name, i in members.items()}}.items():
            info = tarfile.TarInfo(f"a.{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match=rf"bad\.tar: row 'a': .*{message}"):
        index_tar(tmp_path / "bad.tar")


def huge(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ((), "0 frames; a clip has 2 to 768, 2 a second"),
        (clip(1), "1 frames"),
        (clip(1) * (MAX_FRAMES + 1), "769 frames; a clip has 2 to 768"),
        ((*clip(3), frame(32, 64, 0)), "frame 3 has 32 x 64 pixels, and frame 0 64 x 32: make them alike"),
        ((*clip(2), b"no image"), "frame 2: not an image"),
        ((huge(5000, 3000),) * 2, "2 frames of 5000 x 3000 pixels; .* at most 9,437,184 pixels each"),
        ((huge(3000, 3000),) * 40, "40 frames of 3000 x 3000 pixels; .* and 268,435,456 in all"),
        ((huge(30_000, 1),) * 2, "frame 0: image of 30000 x 1 pixels"),
        ((huge(64, 3),) * 2, "2 frames of 64 x 3 pixels; at least 4 a side"),
    ],
)
def test_a_clip_is_bounded_before_anything_of_it_is_decoded(
    encoder: Encoder, frames: tuple[bytes, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(image: Image.Image) -> None:
        raise AssertionError("pixels are decoded")

    monkeypatch.setattr(Image.Image, "load", refuse)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    with pytest.raises(RowError, match=f"clip 0: {message}") as error:
        pack(prompt(frames))
    assert error.value.cause == "bad clip"
    with pytest.raises(ValueError, match=message):
        encoder.encode(prompt(frames))


def test_a_torn_frame_is_left_out_when_shards_are_prepared_and_an_error_in_training(encoder: Encoder) -> None:
    torn = prompt((*clip(3), clip(4)[3][:-200]))
    with pytest.raises(RowError, match="clip 0: frame 3: its pixels cannot be read"):
        pack(torn, decode=True)
    with pytest.raises(OSError, match="truncated"):
        encoder.pixel_values(encoder.encode(torn))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (prompt(clip(2)).with_items("video", ()), "1 video parts in its messages, and 0 clips"),
        (replace(prompt(clip(2)), modality="image"), "1 clips, and its modality is 'image'"),
        (replace(MIXED["image"], modality="video"), "0 clips, and its modality is 'video'"),
    ],
)
def test_a_row_whose_clips_do_not_match_is_refused(encoder: Encoder, row: Prompt, message: str) -> None:
    with pytest.raises(RowError, match=message):
        pack(row)


def test_placeholders_and_clips_must_match(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="1 video placeholders for 2 clips"):
        encoder.encode(prompt(clip(2)).with_items("video", (clip(2), clip(2))))


def test_a_processor_of_another_family_takes_no_clips(tmp_path: Path) -> None:
    build("qwen2_5_vl", tmp_path)
    with pytest.raises(
        ValueError, match=r"clips need the processor of Qwen3-VL or Qwen3\.5, and this one is Qwen2_5_VLProcessor"
    ):
        Encoder(tmp_path).encode(prompt(clip(2)))


@pytest.mark.parametrize("cap", [None, True])
@pytest.mark.parametrize(("frames", "width", "height"), SHAPES)
def test_ids_grids_and_pixels_are_those_of_the_processor(
    tmp_path: Path, frames: int, width: int, height: int, cap: bool | None
) -> None:
    processor = build_processor()
    processor.video_processor.cap_pixels_per_frame, processor.video_processor.max_video_tokens = cap, 3
    processor.save_pretrained(tmp_path)
    encoder = Encoder(tmp_path)
    encoded = encoder.encode(prompt(clip(frames, width, height)))
    text = encoder.processor.apply_chat_template(
        list(encoded.prompt.messages), tokenize=False, add_generation_prompt=True
    )
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in encoded.prompt.items("video")[0]])
    about = VideoMetadata(total_num_frames=frames, fps=float(FPS), frames_indices=list(range(frames)))
    real = encoder.processor(
        text=[text], videos=[pixels], video_metadata=[about], do_sample_frames=False, return_tensors="pt"
    )
    assert list(encoded.expanded) == real["input_ids"][0].tolist()
    patches, grids = encoder.pixel_values(encoded)
    assert grids.tolist() == real["video_grid_thw"].tolist() == [list(grid) for grid in encoded.grids]
    assert patches.equal(real["pixel_values_videos"])


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_every_family_that_takes_clips_packs_them_with_images_and_text(
    tmp_path: Path, encoded: dict[str, Encoded], kind: str
) -> None:
    build(kind, tmp_path)
    encoder, student = Encoder(tmp_path), load_student(tmp_path, torch.float32)
    items = [Item.to_score(one, TOKENS) for one in encoded.values()]
    collate = Collator(encoder, student.model.get_rope_index, 3 * 2 * 16 * 16, 2, layout(student))
    batch = collate(items, range(len(items)))
    with torch.no_grad():
        packed = student(**batch.inputs).split(len(TOKENS))
    for i, logprobs in zip(batch.order, packed, strict=True):
        assert logprobs.tolist() == pytest.approx(of_transformers(student, encoder, items[i].encoded, TOKENS), abs=1e-4)


def test_a_micro_batch_of_clips_needs_no_blank_image_decodes_each_once_and_trains_the_vision_tower(
    model: Path, encoder: Encoder, encoded: dict[str, Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    plain = encoder.pixel_values
    monkeypatch.setattr(encoder, "pixel_values", lambda e: decoded.append(e.prompt.key) or plain(e))
    student = load_student(model, torch.float32).train()
    items = [
        Item.to_score(encoded[name], tokens) for name in ("two clips", "8 of 64x64") for tokens in (TOKENS, TOKENS[:2])
    ]
    assert items[0].patches == 2 * (2 * 4) + 2 * (4 * 2)
    batch = Collator(encoder, student.model.get_rope_index, 3 * 2 * 16 * 16, 2, "masked")(items, range(4))
    assert len(decoded) == 2
    assert batch.inputs["media_index"]["image"] == []
    assert sorted(batch.inputs["media_index"]["video"]) == [0, 1, 2]
    student(**batch.inputs).sum().backward()
    assert all(
        weight.grad is not None and weight.grad.abs().max() > 0
        for weight in student.model.visual.patch_embed.parameters()
    )


def test_blank_frames_keep_every_token_and_other_views_say_or_refuse_what_they_show(
    encoder: Encoder, encoded: dict[str, Encoded]
) -> None:
    two, mixed = encoded["two clips"], encoded["an image and a clip"]
    blank = encode_view(encoder, two, BUILT_IN["blank"])
    assert (blank.ids, blank.expanded, blank.grids) == (two.ids, two.expanded, two.grids)
    assert encoder.pixel_values(blank)[0].unique().numel() == 1
    for view in ("text", "caption"):
        shown = encode_view(encoder, mixed, BUILT_IN[view])
        assert not shown.prompt.is_visual
        assert set(encoder.tokens.values()).isdisjoint(shown.expanded)
        assert ("It moves." in encoder.tokenizer.decode(shown.ids)) == (view == "caption")
    told = encode_view(encoder, two, BUILT_IN["privileged"])
    assert told.prompt.others == two.prompt.others
    with pytest.raises(ViewError, match="v/two: a pixel budget is for images, and the prompt has a clip"):
        encode_view(encoder, two, View(max_pixels=1024))


def test_the_task_asks_with_a_clip_and_judges_the_letter() -> None:
    task = load_tasks()["video_choice"]
    row = task.prompt("k", QUESTION, "B", videos=[clip(3)])
    assert (row.modality, row.messages[0]["content"][0]) == ("video", {"type": "video"})
    assert [task.verify(said, row.answer) for said in ("\\boxed{B}", "\\boxed{A}")] == [verify.RIGHT, verify.WRONG]
    pack(row)


def test_the_report_shows_some_frames(encoded: dict[str, Encoded]) -> None:
    for name, frames in {"9 of 200x180": 5, "35 of 32x32": 7, "an image and a clip": 1 + 5}.items():
        sample = Sample(0, RESPONSE, verify.RIGHT, Score("t", (-1.0,)))
        assert len(token_row(0, encoded[name].prompt, sample, ["B"], [0.0], kept=True).images) == frames
