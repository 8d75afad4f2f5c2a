"""A page of the first rows of a source as they will be asked, with their images; one file that loads nothing."""

from collections.abc import Sequence
from pathlib import Path

from mmopd.errors import UserError
from mmopd.prompts.prepare import Count, First
from mmopd.prompts.row_parts import shortened
from mmopd.prompts.row_view import outcome, title
from mmopd.prompts.rows import plain
from mmopd.report.html import PAGE_IMAGES, resource, template
from mmopd.report.inspection.page import LINES, TEXT_LIMIT, turns


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
    left = {"images": PAGE_IMAGES}
    views = []
    for first in rows:
        extra = {plain(name): shortened(text, TEXT_LIMIT, LINES) for name, text in first.prompt.extra.items()}
        answer = shortened(first.prompt.answer, TEXT_LIMIT, LINES)
        views.append({"title": title(first), "turns": turns(first.prompt, left), "answer": answer, "extra": extra})
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
