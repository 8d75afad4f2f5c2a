"""Views: under every view the log-probs are those of the student's own tokens, and the server's prompt ids are the
expected ones.
"""

import asyncio
import io

import httpx
import pytest
import torch
from fake_vllm import FakeVLLM, logprob
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from transformers import AutoModelForImageTextToText

from mmopd.config import Engine, View
from mmopd.demo.world import build_processor, build_student
from mmopd.modality import Encoder
from mmopd.modality.pixels import open_image, size_of, to_rgb
from mmopd.records import Prompt
from mmopd.runtime.processes import Children
from mmopd.serving import wire
from mmopd.serving.servers import serve
from mmopd.serving.specs import ServerSpec
from mmopd.teacher.view import BUILT_IN, ViewError, blinded, check_view, encode_view, sees_image

TOKENS = (5, 6, 7, 8)
LARGE = 384 * 384  # pixels; more than the student's 256 * 256
VIEWS = {**BUILT_IN, "small": View(max_pixels=64 * 64), "large": View(min_pixels=320 * 320, max_pixels=LARGE)}


def write(width: int, height: int, form: str = "PNG", mode: str = "RGB", **how: object) -> bytes:
    """Write an image in which all places differ."""
    ramp = Image.linear_gradient("L")
    file = io.BytesIO()
    Image.merge("RGB", [ramp.rotate(turn).resize((width, height)) for turn in (0, 90, 180)]).convert(mode).save(
        file, form, **how
    )  # type: ignore[arg-type]
    return file.getvalue()


def sideways(width: int, height: int) -> bytes:
    """Write an image stored on its side: a viewer shows it `height` wide and `width` high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return write(width, height, "JPEG", exif=exif)


def transparent(width: int, height: int) -> bytes:
    image = Image.open(io.BytesIO(write(width, height, mode="RGBA")))
    image.putalpha(Image.linear_gradient("L").resize((width, height)))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


IMAGES = {
    "text": (),
    "multiple": (write(64, 32),),
    "no multiple": (write(37, 211),),
    "one pixel": (write(1, 1),),
    "one pixel high": (write(150, 1),),
    "palette": (write(70, 50, mode="P"),),
    "sideways": (sideways(96, 60),),
    "transparent": (transparent(100, 60),),
    "two": (write(100, 40), sideways(200, 40)),
}


def prompt(images: tuple[bytes, ...] = (), **more: object) -> Prompt:
    parts = [{"type": "image"}] * len(images)
    messages = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*parts, {"type": "text", "text": "What is their sum?"}]},
    )
    values = {"messages": messages, "extra": {"caption": "A three and a five.", "ocr": "3 5"}}
    return Prompt(
        key="p/0", task="t", modality="image" if images else "text", images=images, answer="8", **(values | more)
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    build_processor().save_pretrained(folder)
    return Encoder(folder)


def with_large_budget(folder):
    """Return a processor that does not shrink images of `LARGE` pixels, like a teacher with a larger budget than the
    student.
    """
    processor = build_processor()
    processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": LARGE}
    processor.save_pretrained(folder)
    return Encoder(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return with_large_budget(tmp_path_factory.mktemp("teacher"))


class Upright(FakeVLLM):
    """Reads EXIF, as the real processor does."""

    def _grid(self, image, pixels):
        return pixels.grid(*size_of(open_image(image)))


async def ask(endpoint, shown):
    """Return the log-probs of TOKENS after the shown prompt; parsing checks the expected ids."""
    body = wire.scoring_body(endpoint.model, shown, TOKENS)
    async with httpx.AsyncClient() as http:
        headers = endpoint.headers | {wire.REQUEST_ID: "r", "content-type": "application/json"}
        reply = await http.post(endpoint.url + wire.PATH, content=body, headers=headers, timeout=300)
    assert reply.status_code == 200, reply.text
    return wire.parse_scores(reply.content, "r", shown.expanded, TOKENS)


@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("view", VIEWS)
def test_a_score_is_that_of_the_students_tokens_under_every_view(encoder, teacher, view, images):
    seer = teacher if view == "large" else encoder
    shown = encode_view(encoder, encoder.encode(prompt(IMAGES[images])), VIEWS[view])
    text = encoder.processor.apply_chat_template(
        list(shown.prompt.messages), tokenize=False, add_generation_prompt=True
    )
    pictures = [to_rgb(open_image(image)) for image in shown.prompt.images]
    real = seer.processor(text=[text], images=pictures or None, return_tensors="pt")
    assert list(shown.expanded) == real["input_ids"][0].tolist()
    assert [list(grid) for grid in shown.grids] == (real["image_grid_thw"].tolist() if pictures else [])

    async def main():
        async with Upright(seer) as server:
            scores = await ask(server.endpoint, shown)
            return scores, server.requests

    scores, [request] = asyncio.run(main())
    assert scores == tuple(logprob(t, len(shown.expanded) + i, shown.prompt.images) for i, t in enumerate(TOKENS))
    assert request["token_ids"] == [*shown.ids, *TOKENS]
    assert len(request.get("content_parts", ())) == len(shown.prompt.images) == shown.ids.count(encoder.image_token)


@pytest.mark.parametrize("images", IMAGES)
def test_a_view_that_shows_all_of_the_prompt_is_the_prompt_itself(encoder, images):
    encoded = encoder.encode(prompt(IMAGES[images]))
    for name in VIEWS if images == "text" else ["full"]:
        assert (encode_view(encoder, encoded, VIEWS[name]) is encoded) == (name != "privileged")


@pytest.mark.parametrize("images", [name for name in IMAGES if name != "text"])
def test_a_blank_image_has_the_size_and_the_tokens_of_its_own_and_no_content(encoder, images):
    encoded = encoder.encode(prompt(IMAGES[images]))
    shown = encode_view(encoder, encoded, VIEWS["blank"])
    assert (shown.ids, shown.expanded, shown.grids) == (encoded.ids, encoded.expanded, encoded.grids)
    for image, blank in zip(IMAGES[images], shown.prompt.images, strict=True):
        assert Image.open(io.BytesIO(blank)).size == size_of(open_image(image))
        assert set(to_rgb(open_image(blank)).get_flattened_data()) == {(128, 128, 128)}
        assert len(set(to_rgb(open_image(image)).get_flattened_data())) > 1 or size_of(open_image(image)) == (1, 1)


def test_a_budget_makes_images_larger_or_smaller_and_changes_nothing_but_their_size(encoder):
    photo = transparent(300, 200)
    small, large = (encode_view(encoder, encoder.encode(prompt((photo,))), VIEWS[name]) for name in ("small", "large"))
    for shown, size in ((small, (64, 32)), (large, (416, 288))):
        [sent] = shown.prompt.images
        assert open_image(sent).format == "PNG"
        assert open_image(sent).size == size
        assert open_image(sent).tobytes() == to_rgb(open_image(photo)).resize(size, Image.Resampling.BICUBIC).tobytes()
    assert [encoder.pixels.tokens(shown.grids[0]) for shown in (small, large)] == [2, 13 * 9]
    assert encoder.pixels.tokens(encoder.pixels.grid(416, 288)) < 13 * 9, (
        "the student's own budget would make it smaller again"
    )


def test_a_server_that_makes_a_larger_image_smaller_again_gives_no_score(encoder):
    shown = encode_view(encoder, encoder.encode(prompt((write(300, 300),))), VIEWS["large"])

    async def main():
        async with Upright(encoder) as server:
            await ask(server.endpoint, shown)

    with pytest.raises(wire.ReplyError, match=r"ids: the server saw \d+ prompt tokens"):
        asyncio.run(main())


def test_one_bound_of_a_budget_leaves_the_other_to_the_student(encoder):
    encoded = encoder.encode(prompt((write(64, 64), write(600, 600))))

    def sizes(**view):
        return [open_image(image).size for image in encode_view(encoder, encoded, View(**view)).prompt.images]

    assert sizes(min_pixels=128 * 128) == [(128, 128), (256, 256)]
    assert sizes(max_pixels=128 * 128) == [(64, 64), (128, 128)]
    assert sizes(min_pixels=512 * 512) == [(512, 512), (512, 512)]
    assert sizes(max_pixels=1) == [(32, 32), (32, 32)]


def test_an_image_that_a_budget_does_not_change_is_sent_byte_by_byte(encoder):
    encoded = encoder.encode(prompt((sideways(64, 32),)))
    assert encode_view(encoder, encoded, VIEWS["small"]).prompt.images == encoded.prompt.images


def test_images_are_drawn_once_for_all_responses_of_a_prompt(encoder):
    encoded = encoder.encode(prompt((write(311, 97),)))
    for name in ("blank", "small", "large"):
        first, second = (encode_view(encoder, encoded, VIEWS[name]).prompt.images[0] for _ in range(2))
        assert first is second


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 400), st.integers(1, 400)), st.integers(1024, LARGE), st.booleans())
def test_the_tokens_of_a_budget_are_those_of_the_processor_for_any_size(encoder, teacher, size, pixels, blank):
    width, height = size if max(size) <= 150 * min(size) else (max(size), max(size))
    encoded = encoder.encode(prompt((write(width, height),)))
    shown = encode_view(encoder, encoded, View(images="blank" if blank else "keep", max_pixels=pixels))
    assert teacher.pixel_values(shown)[1].tolist() == [list(shown.grids[0])]


def asked(encoder, shown):
    """Return the text that a teacher reads."""
    return encoder.tokenizer.decode(shown.ids)


def test_words_take_the_place_of_the_first_image(encoder):
    images = (write(64, 32), write(32, 32))
    parts = [{"type": "text", "text": "Look: "}, {"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    encoded = encoder.encode(prompt(images, messages=({"role": "user", "content": parts},)))
    header, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    assert asked(encoder, encode_view(encoder, encoded, VIEWS["text"])) == f"{header}Look: and{end}"
    assert (
        asked(encoder, encode_view(encoder, encoded, VIEWS["caption"]))
        == f"{header}Look: A three and a five.\nand{end}"
    )
    assert asked(encoder, encode_view(encoder, encoded, VIEWS["ocr"])) == f"{header}Look: 3 5\nand{end}"
    braces = View(images="drop", instead="{{{caption}}} [{answer}] ")
    assert (
        asked(encoder, encode_view(encoder, encoded, braces)) == f"{header}Look: {{A three and a five.}} [8] and{end}"
    )


def test_a_hint_ends_the_users_last_message_and_the_images_stay(encoder):
    turns = (
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "The sum?"}]},
        {"role": "assistant", "content": "Well"},
    )
    image = prompt((write(64, 32),), messages=turns)
    shown = encode_view(encoder, encoder.encode(image), VIEWS["privileged"])
    assert shown.prompt.images == image.images
    assert "The sum?\nThe answer is 8.<|im_end|>\n<|im_start|>assistant\nWell" in asked(encoder, shown)
    assert "user\nHello<|im_end|>" in asked(encoder, shown)
    words = encode_view(encoder, encoder.encode(prompt(messages=turns[:1])), VIEWS["privileged"])
    assert "user\nHello\nThe answer is 8.<|im_end|>" in asked(encoder, words)
    with pytest.raises(ViewError, match="p/0: the prompt has no user message"):
        encode_view(
            encoder, encoder.encode(prompt(messages=({"role": "system", "content": "Hi"},))), VIEWS["privileged"]
        )


@pytest.mark.parametrize(
    ("view", "row", "message"),
    [
        (
            VIEWS["caption"],
            {"extra": {"ocr": "3"}},
            r"^p/0: the row has no text 'caption', which its view shows; it has answer, ocr$",
        ),
        (VIEWS["caption"], {"extra": {"caption": " \n"}}, r"^p/0: .* no text 'caption'.* it has answer$"),
        (View(hint="{hint}"), {}, r"^p/0: .* no text 'hint'"),
    ],
)
def test_a_row_that_lacks_what_a_view_shows_is_named(encoder, view, row, message):
    with pytest.raises(ViewError, match=message):
        encode_view(encoder, encoder.encode(prompt((write(64, 32),), **row)), view)


def test_a_row_whose_pixels_cannot_be_redrawn_is_named(encoder, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # importing lmms-eval sets this
    torn = encoder.encode(prompt((write(300, 300)[:-200],)))  # the header is whole
    with pytest.raises(ViewError, match=r"^p/0: "):
        encode_view(encoder, torn, VIEWS["small"])
    assert encode_view(encoder, torn, VIEWS["blank"]).expanded == torn.expanded
    thin = encoder.encode(prompt((write(8000, 40),)))
    with pytest.raises(ViewError, match=r"^p/0: absolute aspect ratio"):  # 32 x 8000: a server would refuse it
        encode_view(encoder, thin, View(max_pixels=300_000))


@pytest.mark.parametrize(
    "template", ["{}", "{0}", "{answer.__class__}", "{answer[0]}", "{answer!r}", "{answer:>9}", "{", "}", "{a b}"]
)
def test_a_template_has_plain_names_only(encoder, template):
    for view in (View(hint=template), View(images="drop", instead=template)):
        with pytest.raises(ViewError, match="write a literal brace twice"):
            check_view(view)
        with pytest.raises(ViewError, match="write a literal brace twice"):
            encode_view(encoder, encoder.encode(prompt((write(64, 32),))), view)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"instead": "x"}, "`instead`.*needs `images: drop`"),
        ({"images": "blank", "instead": "x"}, "`instead`.*needs `images: drop`"),
        ({"images": "drop", "max_pixels": 9}, "has no effect"),
        ({"min_pixels": 10, "max_pixels": 9}, "min_pixels 10 is more than max_pixels 9"),
        ({"max_pixels": 10**9}, "budget of 1000000000; at most"),
    ],
)
def test_keys_that_do_nothing_together_are_refused(keys, message):
    with pytest.raises(ViewError, match=message):
        check_view(View(**keys))


def test_the_built_in_views_are_well_formed_and_only_some_see_the_image():
    for view in VIEWS.values():
        check_view(view)
        check_view(blinded(view)) if not view.instead else None
    assert {name for name, view in VIEWS.items() if sees_image(view)} == {"full", "privileged", "small", "large"}
    assert blinded(VIEWS["privileged"]) == View(images="blank", hint=VIEWS["privileged"].hint)
    assert not any(sees_image(blinded(view)) for view in VIEWS.values())


def hf_logprobs(model, teacher, shown):
    """Return transformers' log-probs of TOKENS after the shown prompt."""
    ids = torch.tensor([[*shown.expanded, *TOKENS]])
    pixels = {}
    if shown.grids:
        values, grids = teacher.pixel_values(shown)
        pixels = {"pixel_values": values, "image_grid_thw": grids}
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=(ids == teacher.image_token).int(), **pixels).logits[0]
    rows = logits[len(shown.expanded) - 1 : -1].log_softmax(-1)
    return [row[t].item() for row, t in zip(rows, TOKENS, strict=True)]


@pytest.mark.usefixtures("server")
def test_a_real_server_scores_the_students_tokens_under_every_view(encoder, tmp_path):
    build_student(tmp_path / "model")
    teacher = with_large_budget(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    engine = Engine(dtype="float32", max_model_len=512, max_num_seqs=16, kv_cache_mib=64, enforce_eager=True)
    spec = ServerSpec("tiny", tmp_path / "model", engine, updatable=False)
    encoded = {images: encoder.encode(prompt(IMAGES[images])) for images in IMAGES}
    shown = {(images, view): encode_view(encoder, encoded[images], VIEWS[view]) for images in IMAGES for view in VIEWS}

    async def main(endpoint):
        return dict(zip(shown, await asyncio.gather(*(ask(endpoint, one) for one in shown.values())), strict=True))

    with Children() as children, serve([spec], children, tmp_path, lambda name, what: None) as servers:
        scores = asyncio.run(main(servers["tiny"]))
    for name, one in shown.items():
        assert list(scores[name]) == pytest.approx(hf_logprobs(model, teacher, one), abs=1e-4), name
    assert (
        len({scores["multiple", view] for view in VIEWS}) == len(VIEWS) - 1
    )  # "small" does not change an image of 64 x 32
