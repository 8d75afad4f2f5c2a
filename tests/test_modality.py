"""Prompts as ids: our counts equal those of transformers' own processor, and nothing large is decoded."""

import io
from pathlib import Path

import pytest
from PIL import Image

from mmopd.errors import CheckpointError, UserError
from mmopd.modality import Encoder, encode
from mmopd.modality.pixels import open_image, size_of, to_rgb
from mmopd.records import Prompt


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(file, "PNG")
    return file.getvalue()


def prompt(*images: bytes, placeholders: int | None = None) -> Prompt:
    parts = [{"type": "image"}] * (len(images) if placeholders is None else placeholders)
    messages = ({"role": "user", "content": [*parts, {"type": "text", "text": "What is their sum?"}]},)
    return Prompt("p/0", "digit_sum", "image" if images else "text", messages, images, "8")


@pytest.mark.parametrize(
    "sizes", [[], [(64, 32)], [(37, 211)], [(1, 1)], [(1, 180), (150, 3), (2700, 17)], [(700, 300), (64, 32)]]
)
def test_ids_and_grids_are_those_of_the_processor(encoder: Encoder, sizes: list[tuple[int, int]]) -> None:
    encoded = encoder.encode(prompt(*(png(*size) for size in sizes)))
    text = encoder.processor.apply_chat_template(
        list(encoded.prompt.messages), tokenize=False, add_generation_prompt=True
    )
    images = [Image.open(io.BytesIO(data)) for data in encoded.prompt.images]
    expected = encoder.processor(text=[text], images=images or None, return_tensors="pt")
    assert list(encoded.expanded) == expected["input_ids"][0].tolist()
    assert encoded.ids.count(encoder.image_token) == len(sizes)
    if sizes:
        assert [list(grid) for grid in encoded.grids] == expected["image_grid_thw"].tolist()
        assert encoder.pixel_values(encoded)[0].equal(expected["pixel_values"])


def test_placeholders_and_images_must_match(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="2 image placeholders for 1 images"):
        encoder.encode(prompt(png(64, 32), placeholders=2))


def test_an_image_is_bounded_by_its_header_alone() -> None:
    with pytest.raises(ValueError, match="30000 x 1 pixels"):
        open_image(png(30_000, 1))
    with pytest.raises(ValueError, match="not an image"):
        open_image(b"GIF89a nothing")


def test_control_tokens_of_vision_are_known_to_be_banned(encoder: Encoder) -> None:
    assert encoder.image_token in encoder.banned
    assert encoder.tokenizer.convert_tokens_to_ids("<|video_pad|>") in encoder.banned
    assert encoder.tokenizer.eos_token_id not in encoder.banned


def test_a_folder_without_a_processor_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        Encoder(tmp_path)


def test_images_are_read_upright_and_on_white_as_servers_do(encoder: Encoder) -> None:
    sideways, clear = io.BytesIO(), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers turn it by 90 degrees
    Image.new("RGB", (96, 64), "red").save(sideways, "JPEG", exif=exif)
    Image.new("RGBA", (64, 32), (255, 0, 0, 0)).save(clear, "PNG")
    turned, white = encoder.encode(prompt(sideways.getvalue())), encoder.encode(prompt(clear.getvalue()))
    assert turned.grids == ((1, 6, 4),)
    encoder.pixel_values(turned)
    assert encoder.pixel_values(white)[0].equal(encoder.pixel_values(encoder.encode(prompt(png(64, 32))))[0])


def test_the_size_of_a_png_is_read_without_its_pixels_and_its_orientation_wherever_it_stands() -> None:
    whole = png(96, 64)
    assert size_of(open_image(whole[:-60])) == (96, 64), "cut inside its pixels"
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (96, 64)).save(file, "PNG", exif=exif)
    early = file.getvalue()
    start = early.index(b"eXIf") - 4
    chunk = early[start : start + 12 + int.from_bytes(early[start : start + 4], "big")]
    end = early.index(b"IEND") - 4
    late = early[:start] + early[start + len(chunk) : end] + chunk + early[end:]
    assert size_of(open_image(early)) == size_of(open_image(late)) == to_rgb(open_image(late)).size == (64, 96)


def test_a_chat_template_that_does_not_end_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Encoder(model)
    slow.processor.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    monkeypatch.setattr(encode, "RENDER_SECONDS", 0.2)
    with pytest.raises(CheckpointError, match=r"its chat template did not end within 0\.2 s for p/0"):
        slow.encode(prompt())
    slow.processor.chat_template = "{{ messages.append(1) }}"
    with pytest.raises(ValueError, match=r"do not fit the chat template: .*unsafe"):  # Jinja's sandbox
        slow.encode(prompt())
