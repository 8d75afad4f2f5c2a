"""The media that a prompt may have. A new medium is one file in this package and one line in `MEDIA`."""

from mmopd.modality.base import Medium
from mmopd.modality.image import ImageMedium
from mmopd.modality.video import VideoMedium
from mmopd.records import Encoded, Files, Grid, Prompt

MEDIA: dict[str, Medium] = {
    medium.name: medium
    for medium in (
        ImageMedium(),
        VideoMedium(),
    )
}


def shown_items(prompt: Prompt) -> list[tuple[Medium, Files]]:
    """Return the items that a prompt shows, in the order of `MEDIA` and then of its messages.

    `Encoded.grids`, the patches and the content parts of requests have the same order.
    """
    return [(medium, files) for medium in MEDIA.values() for files in prompt.items(medium.name)]


def check_items(prompt: Prompt) -> None:
    """Decode all files of a prompt, and compare their sizes with those that its grids were counted from.

    Raises:
        ValueError: an item cannot be used; names the prompt and the item.
    """
    for medium, files in shown_items(prompt):
        try:
            medium.check(files, decode=True)
        except ValueError as error:
            raise ValueError(f"{prompt.key}: {medium.item}: {error}") from None


def slots() -> dict[str, list[Medium]]:
    """Return the inputs of the model, each with the media that go into it."""
    found: dict[str, list[Medium]] = {}
    for medium in MEDIA.values():
        found.setdefault(medium.slot, []).append(medium)
    return found


def grids_by_slot(encoded: Encoded) -> dict[str, list[Grid]]:
    """Return the grids of a prompt for each input of the model."""
    found: dict[str, list[Grid]] = {slot: [] for slot in slots()}
    for (medium, _), grid in zip(shown_items(encoded.prompt), encoded.grids, strict=True):
        found[medium.slot].append(grid)
    return found
