"""A page of the first rows of a source as they will be asked, with their images; one file that loads nothing."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmopd.errors import UserError
from mmopd.prompts.prepare import Count, First
from mmopd.prompts.row_view import Item, messages, outcome, shortened, title
from mmopd.prompts.rows import plain
from mmopd.report import heatmap
from mmopd.report.html import PAGE_IMAGES, resource, template

ITEMS = 8  # of a row that are shown
FILES = 8  # of an item, such as frames of a clip, that are shown
TEXT_LIMIT = 20_000  # characters
LINES = 1_000


def write_preview(path: Path, name: str, source: str, rows: Sequence[First], count: Count) -> None:
    """Write the page.

    Args:
        name: the folder of shards that the rows would go into.
        source: the converter with its settings.
        rows: the rows.
        count: what became of the examples up to the last of these rows.

    Raises:
        UserError: the file cannot be written.
    """
    left = PAGE_IMAGES
    views = []
    for first in rows:
        turns = []
        shown = 0
        for role, parts in messages(first.prompt):
            view = []
            for part in parts:
                if isinstance(part, Item):
                    shown += 1
                    view.append(_item(part, left if shown <= ITEMS else 0))
                    left -= sum(len(picture["url"]) for picture in view[-1]["pictures"])
                else:
                    view.append({"text": shortened(part.strip(), TEXT_LIMIT, LINES)})
            turns.append({"role": role, "parts": view})
        extra = {plain(name): shortened(text, TEXT_LIMIT, LINES) for name, text in first.prompt.extra.items()}
        answer = shortened(first.prompt.answer, TEXT_LIMIT, LINES)
        views.append({"title": title(first), "turns": turns, "answer": answer, "extra": extra})
    causes = [{"cause": plain(cause), "n": n, "shown": count.shown[cause]} for cause, n in count.left_out.most_common()]
    page = template("preview.html.j2").render(
        name=plain(name),
        source=plain(source),
        rows=views,
        outcome=outcome(count),
        causes=causes,
        css=resource("report.css"),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise UserError(f"{path}: the preview cannot be written: {error.strerror}") from None


def _item(item: Item, left: int) -> dict[str, Any]:
    """Return an item for the template, with as many pictures as fit into the characters that are `left`."""
    pictures = list[dict[str, Any]]()
    problem = "" if left > 0 else "not shown, because the page is full"
    for file in item.files[:FILES] if left > 0 else ():
        try:
            url, width, height = heatmap.picture(base64.b64encode(file).decode())
        except ValueError as error:  # larger than a page shows
            problem = f"not shown: {error}"
            continue
        left -= len(url)
        if left < 0:
            problem = "not shown, because the page is full"
            break
        pictures.append({"url": url, "width": width, "height": height})
    return {"text": None, "label": item.label, "pictures": pictures, "problem": problem}
