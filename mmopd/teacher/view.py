"""Views: a teacher is shown all of a prompt, or a version with other images and words.

Only the prompt is rewritten. Under every view the ids of the response are the student's own, so that a score has one
log-prob for each of the student's tokens, whatever stands before them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from string import Formatter
from typing import TYPE_CHECKING

from mmopd.config import View
from mmopd.modality.pixels import MAX_PIXELS, PixelPolicy
from mmopd.modality.registry import MEDIA
from mmopd.records import Encoded, Message, Prompt

if TYPE_CHECKING:
    from mmopd.modality import Encoder  # imports transformers, which rules for views do not need

BUILT_IN: Mapping[str, View] = {
    "full": View(),
    "text": View(images="drop"),
    "blank": View(images="blank"),
    "caption": View(images="drop", instead="{caption}\n"),
    "ocr": View(images="drop", instead="{ocr}\n"),
    "privileged": View(hint="\nThe answer is {answer}."),
}


class ViewError(ValueError):
    """A view that is not well formed, or a row without a text that its view shows."""


def check_view(view: View) -> None:
    """Check a view without a row.

    Raises:
        ViewError: keys that do not go together, or a template with more than `{name}` in it.
    """
    budget = view.min_pixels is not None or view.max_pixels is not None
    if view.instead and view.images != "drop":
        raise ViewError("`instead` is text in place of the images: it needs `images: drop`")
    if budget and view.images == "drop":
        raise ViewError("a pixel budget has no effect with `images: drop`; remove one of them")
    if view.min_pixels and view.max_pixels and view.min_pixels > view.max_pixels:
        raise ViewError(f"min_pixels {view.min_pixels} is more than max_pixels {view.max_pixels}")
    if max(view.min_pixels or 0, view.max_pixels or 0) > MAX_PIXELS:
        raise ViewError(f"a pixel budget of {max(view.min_pixels or 0, view.max_pixels or 0)}; at most {MAX_PIXELS}")
    for template in (view.instead, view.hint):
        _parse(template)


def sees_image(view: View) -> bool:
    """Return true if a teacher with this view is shown the items of media themselves."""
    return view.images == "keep"


def blinded(view: View) -> View:
    """Return the view with grey files in place of each item of a medium; the number of visual tokens stays the same."""
    return view.model_copy(update={"images": "blank"})


def encode_view(encoder: "Encoder", encoded: Encoded, view: View) -> Encoded:
    """Return the prompt as a teacher with this view reads it; `encoded` itself if the view changes nothing.

    Under a pixel budget the images are sent as PNG in the size that the budget gives them, and each is expected to
    become as many visual tokens. A server with a smaller budget of its own answers with other ids, which is an error.

    Raises:
        ViewError: the row lacks a text that the view shows (names the row and the text), or has an image or other item
            that cannot be redrawn.
    """
    prompt = encoded.prompt
    budget = _budget(encoder.pixels, view) if prompt.is_visual else None
    redraws = prompt.is_visual and (view.images == "blank" or (view.images == "keep" and budget is not None))
    drops = prompt.is_visual and view.images == "drop"
    if not (redraws or drops or view.hint):
        return encoded
    shown = prompt
    try:
        if drops:
            messages = _without_media(prompt.messages, _fill(view.instead, prompt))
            shown = replace(prompt, messages=messages, images=(), others={})
        if redraws:
            for name, medium in MEDIA.items():
                redrawn = [medium.redraw(files, budget, blank=view.images == "blank") for files in prompt.items(name)]
                shown = shown.with_items(name, redrawn) if redrawn else shown
        if view.hint:
            shown = replace(shown, messages=_with_hint(shown.messages, _fill(view.hint, prompt)))
        # Images that have the size of a budget are cut into patches without another resize.
        pixels = replace(encoder.pixels, min_pixels=1, max_pixels=MAX_PIXELS) if redraws and budget else encoder.pixels
        return encoder.encode(shown, pixels)
    except (ValueError, OSError) as error:  # OSError: pixels that do not decode
        raise ViewError(f"{prompt.key}: {str(error).removeprefix(f'{prompt.key}: ')}") from error


def _budget(own: PixelPolicy, view: View) -> PixelPolicy | None:
    """Return the student's budget with the bounds of the view; a missing bound is moved if it conflicts with the given
    one.
    """
    low = view.min_pixels
    high = view.max_pixels
    if low is None and high is None:
        return None
    return replace(
        own,
        min_pixels=min(own.min_pixels, high or own.min_pixels) if low is None else low,
        max_pixels=max(own.max_pixels, low or own.max_pixels) if high is None else high,
    )


def _without_media(messages: Sequence[Message], instead: str) -> tuple[Message, ...]:
    """Return the messages with `instead` in place of the first item of a medium, and without the other items."""
    text = [{"type": "text", "text": instead}] if instead else []
    shown: list[Message] = []
    for message in messages:
        if isinstance(message["content"], str):
            shown.append(message)
            continue
        parts: list[Message] = []
        for part in message["content"]:
            if part.get("type") in MEDIA:
                parts += text
                text = []
            else:
                parts.append(part)
        shown.append({**message, "content": parts})
    return tuple(shown)


def _with_hint(messages: Sequence[Message], hint: str) -> tuple[Message, ...]:
    """Return the messages with the hint at the end of the user's last message."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise ViewError("the prompt has no user message for the hint")
    content = messages[last]["content"]
    hinted = content + hint if isinstance(content, str) else [*content, {"type": "text", "text": hint}]
    return (*messages[:last], {**messages[last], "content": hinted}, *messages[last + 1 :])


def _fill(template: str, prompt: Prompt) -> str:
    """Return the template with the row's texts in its fields."""
    texts = {**prompt.extra, "answer": prompt.answer}
    filled = ""
    for literal, name in _parse(template):
        filled += literal
        if name is not None:
            if not texts.get(name, "").strip():
                there = ", ".join(sorted(key for key, text in texts.items() if text.strip())) or "none"
                raise ViewError(f"the row has no text {name!r}, which its view shows; it has {there}")
            filled += texts[name]
    return filled


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Return (text, name of the field after it) of each piece of a template.

    Attributes, indices and formats are refused, because rows and views are data.
    """
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise ViewError(f"{template!r}: {error}; write a literal brace twice") from None
    for _, name, form, conversion in pieces:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise ViewError(f"{template!r}: a field is a plain name such as {{caption}}; write a literal brace twice")
    return [(literal, name) for literal, name, _, _ in pieces]
