"""Every format and mode with every orientation is sized and read as vLLM's and transformers' loaders read it."""

import io

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, features
from PIL.PngImagePlugin import PngInfo
from transformers.image_utils import load_image
from vllm.multimodal.media.image import ImageMediaIO

from mmopd.modality import Encoder
from mmopd.modality.pixels import check_image, encode_upright, open_image, size_of, to_rgb
from mmopd.modality.video import clip_size
from mmopd.prompts.convert import SourceSettings, images
from mmopd.prompts.rows import RowError
from mmopd.records import Prompt

ORIENTATION = 0x0112
MODES = {
    "JPEG": ("RGB", "L", "CMYK", "YCbCr"),
    "MPO": ("RGB",),
    "PNG": ("RGB", "RGBA", "L", "LA", "P", "1"),
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "LAB"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "L", "P", "1"),
}
NOTED = ("JPEG", "MPO", "PNG", "WEBP", "TIFF")  # formats that hold EXIF
WIDTH, HEIGHT = 96, 40
PIXELS = np.random.default_rng(7).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)


def picture(mode: str) -> Image.Image:
    if mode == "LAB":
        return Image.merge("LAB", Image.fromarray(PIXELS[..., :3].copy()).split())
    return Image.fromarray(PIXELS, "RGBA").convert("RGB" if mode not in {"RGBA", "LA"} else "RGBA").convert(mode)


def saved(form: str, mode: str, orientation: int | None = None, **options: object) -> bytes:
    """Return an encoded picture with an orientation in its EXIF."""
    file = io.BytesIO()
    if orientation is not None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    if form == "MPO":
        options |= {"save_all": True, "append_images": [picture(mode)]}
    picture(mode).save(file, form, **options)
    return file.getvalue()


def xmp(orientation: int) -> bytes:
    return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


def check(data: bytes, upright: tuple[int, int]) -> None:
    """Compare size and pixels with those of the loaders of servers and of the processor."""
    assert size_of(open_image(data)) == upright
    served = ImageMediaIO().load_bytes(data).media
    ours = to_rgb(open_image(data))
    assert ours.size == served.size == upright
    assert np.array_equal(np.asarray(ours), np.asarray(served.convert("RGB")))
    opened = Image.open(io.BytesIO(data))
    if not (opened.mode in {"RGBA", "LA", "PA"} or "transparency" in opened.info):  # transformers paints on black
        assert np.array_equal(np.asarray(ours), np.asarray(load_image(opened)))
    assert check_image(data, decode=True)[1] == upright


CASES = [(form, mode, n) for form, modes in MODES.items() for mode in modes for n in ((None, *range(10)))]


@pytest.mark.parametrize(("form", "mode", "orientation"), CASES)
def test_an_image_is_sized_and_read_as_servers_and_processors_do(form: str, mode: str, orientation: int | None) -> None:
    if form not in NOTED and orientation is not None:
        return
    turned = orientation is not None and orientation in range(5, 9)
    check(saved(form, mode, orientation), (HEIGHT, WIDTH) if turned else (WIDTH, HEIGHT))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.skipif(not features.check("libtiff"), reason="Pillow was built without libtiff")
def test_a_compressed_tiff_is_turned_once(compression: str, orientation: int) -> None:
    data = saved("TIFF", "RGB", orientation, compression=compression)
    check(data, (HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG", "TIFF"])
def test_an_orientation_in_xmp_counts_where_loaders_count_it(form: str, orientation: int) -> None:
    options: dict[str, object] = {"xmp": xmp(orientation)}
    if form == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp(orientation).decode())
        options = {"pnginfo": info}
    if form == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[700] = xmp(orientation)
        options = {"tiffinfo": tags}
    check(saved(form, "RGB", **options), (HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT))


@pytest.mark.parametrize("form", NOTED)
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_trainer_gets_the_grid_that_was_counted(encoder: Encoder, form: str, orientation: int) -> None:
    messages = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]},)
    encoded = encoder.encode(Prompt("p/0", "t", "image", messages, (saved(form, "RGB", orientation),), "1"))
    assert encoder.pixel_values(encoded)[1].tolist() == [list(grid) for grid in encoded.grids]


def test_the_frames_of_a_clip_are_sized_upright() -> None:
    assert clip_size([saved("TIFF", "RGB", 6)] * 2) == clip_size([saved("JPEG", "RGB", 6)] * 2) == (HEIGHT, WIDTH)


def test_broken_exif_is_a_value_error() -> None:
    info = PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n 4\nzz")
    with pytest.raises(ValueError, match="EXIF cannot be read"):
        size_of(open_image(saved("PNG", "RGB", pnginfo=info)))


def test_a_header_whose_size_is_not_that_of_the_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmopd.modality.pixels.size_of", lambda image: (HEIGHT, WIDTH))
    check_image(saved("PNG", "RGB"))
    with pytest.raises(ValueError, match=r"header gives \(40, 96\) pixels, and it decodes to \(96, 40\)"):
        check_image(saved("PNG", "RGB"), decode=True)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_an_image_in_memory_is_stored_upright(form: str, orientation: int) -> None:
    data = saved(form, "RGB", orientation)
    stored = encode_upright(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(to_rgb(open_image(stored))), np.asarray(to_rgb(open_image(data))))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_an_image_in_memory_of_any_mode_of_8_bits_is_stored(mode: str) -> None:
    (stored,) = images({"image": Image.new(mode, (8, 4))}, "image", SourceSettings(data=".", task="t"))
    assert check_image(stored, decode=True) == ("PNG", (8, 4))


@pytest.mark.parametrize("mode", ["F", "I", "I;16"])
def test_an_image_in_memory_without_an_equal_of_8_bits_is_a_bad_row(mode: str) -> None:
    with pytest.raises(RowError) as error:
        images({"image": Image.new(mode, (8, 4))}, "image", SourceSettings(data=".", task="t"))
    assert error.value.cause == "bad image"
