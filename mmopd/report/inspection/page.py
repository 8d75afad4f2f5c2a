"""The page of `mmopd inspect --page`: one file that loads nothing, of bounded size, with the report's responses."""

import base64
from pathlib import Path
from typing import Any

from mmopd.errors import UserError
from mmopd.prompts.row_parts import Item, messages, shortened
from mmopd.prompts.rows import plain
from mmopd.records import Prompt
from mmopd.report.charts import Tasks
from mmopd.report.heatmap import FULL_COLOUR, visible
from mmopd.report.html import (
    PAGE_IMAGES,
    PAGE_TOKENS,
    RESPONSE_IMAGES,
    pictures_of,
    resource,
    response_view,
    script_json,
    template,
)
from mmopd.report.inspection.found import Entry, Found, Seen

TEXT_LIMIT = 20_000  # characters of a text
LINES = 1_000  # of a text
IDS = 4_000  # of a prompt that are written out
ITEMS = 8  # of a row that are shown
FILES = 8  # of an item, such as frames of a clip, that are shown


def write_page(found: Found, path: Path) -> None:
    """Write the page.

    Raises:
        UserError: the file cannot be written.
    """
    named = [e.response.row.task for e in found.entries if e.response is not None]
    named += [e.prompt.task for e in found.entries if e.prompt is not None]
    tasks = Tasks(named, ())
    left = {"tokens": PAGE_TOKENS, "images": PAGE_IMAGES}
    entries: list[dict[str, Any]] = []
    for entry in found.entries:
        left["tokens"] -= len(entry.response.row.tokens) if entry.response is not None else 0
        if left["tokens"] < 0:
            found.left_out.add(found.what, f"{len(found.entries) - len(entries)} responses, because the page is full")
            break
        entries.append(_entry(found, entry, tasks, left))
    page = template("inspect.html.j2").render(
        what=plain(found.what),
        entries=entries,
        found=found,
        surprises=[_surprise(found, i, tasks) for i in range(len(found.surprises))],
        visual=any(e["response"] is not None and e["response"]["visual"] is not None for e in entries),
        left_out=list(found.left_out),
        data=script_json({"curves": [], "difficulty": [], "marks": []}),
        full_colour=FULL_COLOUR,
        css=resource("report.css"),
        js=resource("page.js") + resource("report.js"),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page.encode("utf-8", "replace"))  # a lone surrogate from a damaged file becomes "?"
    except OSError as error:
        raise UserError(f"{path}: the page cannot be written: {error.strerror}") from None


def _entry(found: Found, entry: Entry, tasks: Tasks, left: dict[str, int]) -> dict[str, Any]:
    """Return an entry for the template."""
    response = None
    if entry.response is not None and found.files is not None:
        response = response_view(found.files, entry.response, tasks, left)
    row = None
    if entry.response is None and entry.prompt is not None:
        row = {
            "turns": turns(entry.prompt, left),
            "answer": shortened(entry.prompt.answer, TEXT_LIMIT, LINES),
            "extra": {plain(k): shortened(v, TEXT_LIMIT, LINES) for k, v in entry.prompt.extra.items()},
            "task": plain(tasks.name(entry.prompt.task)),
            "colour": tasks.colour(entry.prompt.task),
        }
    return {
        "key": plain(entry.key),
        "tokens": entry.tokens,
        "counts": entry.counts,
        "response": response,
        "row": row,
        "seen": [_seen(one, entry.seen[0], left) for one in entry.seen],
    }


def turns(prompt: Prompt, left: dict[str, int]) -> list[dict[str, Any]]:
    """Return the messages of a prompt for a template, with their first images."""
    shown = []
    items = 0
    for role, parts in messages(prompt):
        view: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, Item):
                items += 1
                pictures, problems = pictures_of(_encoded(part.files if items <= ITEMS else ()), left, FILES)
                problem = "; ".join(problems) if items <= ITEMS else "not shown, because the page is full"
                view.append({"text": None, "label": part.label, "pictures": pictures, "problem": problem})
            else:
                view.append({"text": shortened(part.strip(), TEXT_LIMIT, LINES)})
        shown.append({"role": role, "parts": view})
    return shown


def _seen(seen: Seen, student: Seen, left: dict[str, int]) -> dict[str, Any]:
    """Return how a model reads a prompt; the images only if they are not those of the student."""
    files = [file for item in seen.items for file in item[:FILES]] if seen.items != student.items else []
    pictures, problems = pictures_of(_encoded(tuple(files)), left, RESPONSE_IMAGES)
    return {
        "reader": plain(seen.reader),
        "view": plain(seen.view),
        "same": seen is not student and seen.same_as(student),
        "text": shortened(seen.text, TEXT_LIMIT, LINES),
        "sent": len(seen.ids),
        "expanded": seen.expanded,
        "shown": len(seen.items),
        "ids": " ".join(map(str, seen.ids[:IDS])) + (" ..." if len(seen.ids) > IDS else ""),
        "pictures": pictures,
        "problem": plain(seen.problem or "; ".join(problems)),
    }


def _surprise(found: Found, i: int, tasks: Tasks) -> dict[str, Any]:
    one = found.surprises[i]
    row = one.response.row
    return {
        "token": visible(one.token),
        "before": one.before,
        "after": one.after,
        "place": one.place,
        "of": one.response.tokens,
        "probabilities": one.probabilities,
        "difference": one.difference,
        "name": row.teacher_name,
        "task": tasks.name(row.task),
        "step": row.step,
        "verdict": row.verdict,
    }


def _encoded(files: tuple[bytes, ...]) -> list[str]:
    return [base64.b64encode(file).decode() for file in files]
