"""Rows and responses on the terminal, with their images in blocks of half a letter; and as JSON."""

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mmopd.modality.registry import shown_items
from mmopd.prompts.row_parts import Item, messages, shortened
from mmopd.prompts.rows import plain
from mmopd.records import Prompt
from mmopd.report.heatmap import cells, decoded, visible
from mmopd.report.inspection.found import Entry, Found, Seen

COLUMNS = 48  # width of an image
ROWS = 16  # height of an image, in lines; a line has two rows of pixels
FILES = 4  # files of a prompt that are drawn
IDS = 24  # ids that are printed
TOKENS = 400  # tokens of a response that are printed
PLAIN, SOME, MUCH = 0.5, 1.5, 3.0  # nats of difference from which a token is coloured, bold, and reversed


def show(found: Found, console: Console) -> None:
    """Print what was found; images only on a terminal with colours."""
    draws = console.is_terminal and console.color_system is not None
    noun = "responses" if found.files is not None else "rows"
    of = f" that match; there are {found.total:,} in all" if found.matching < found.total else ""
    head = f"{found.what}: {len(found.entries):,} of {found.matching:,} {noun}{of}"
    console.print(Text(plain(head), "bold"), soft_wrap=True)
    for remark in found.remarks:
        console.print(Text(plain(remark)), soft_wrap=True)
    for entry in found.entries:
        console.print(Panel(Group(*_entry(found, entry, draws)), title=_title(entry), title_align="left"))
    if found.surprises:
        console.print(_surprises(found, coloured=console.color_system is not None))
        console.print("p: the probability that each gives the token", style="dim")
    for file, places, more in found.left_out:
        for place in [*places, *([f"{more:,} more"] if more else [])]:
            console.print(Text.assemble(("left out ", "yellow"), plain(f"{file}: {place}")), soft_wrap=True)


def _title(entry: Entry) -> Text:
    if entry.response is not None:
        row = entry.response.row
        style = {"right": "green", "wrong": "red"}.get(row.verdict, "yellow")
        kept = "" if row.kept else ", left out of the loss"
        return Text.assemble(
            (row.verdict, f"bold {style}"),
            plain(f"  {row.task}, step {row.step}, {row.teacher_name}{kept}  {entry.key}"),
        )
    assert entry.prompt is not None
    tokens = "" if entry.tokens is None else f", {entry.tokens:,} tokens"
    return Text(plain(f"{entry.key}: {entry.prompt.task} ({entry.prompt.modality}){tokens}"))


def _entry(found: Found, entry: Entry, draws: bool) -> Iterator[RenderableType]:
    """Yield the parts of an entry."""
    if entry.response is not None and found.files is not None:
        row = entry.response.row
        images = found.files.images(entry.response)
        yield from _pictures(images, draws)
        yield _fields({"prompt": shortened(row.prompt), "expected": shortened(row.answer), "reason": row.reason})
        yield _tokens(entry)
        sums = f"{entry.response.tokens:,} tokens, reward {entry.response.reward:+.3f}"
        yield Text(f"{sums}, advantage {entry.response.advantage:+.3f}", "dim")
    elif entry.prompt is not None:
        yield from _pictures([base64.b64encode(f).decode() for f in _files(entry.prompt)], draws)
        turns = {role: _message(parts) for role, parts in messages(entry.prompt)}
        extra = {shortened(name, 30, 1): shortened(text) for name, text in entry.prompt.extra.items()}
        yield _fields({**turns, "answer": shortened(entry.prompt.answer), **extra})
    if entry.counts is not None:
        yield Text(str(entry.counts), "dim")
    for seen in entry.seen:
        yield _seen(seen, entry.seen[0], draws)


def _fields(fields: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in fields.items():
        if text:
            table.add_row(Text(plain(name)), Text(text))
    return table


def _message(parts: list[str | Item]) -> str:
    return "".join(f"[{part.label}]\n" if isinstance(part, Item) else shortened(part.strip()) for part in parts)


def _tokens(entry: Entry) -> Text:
    """Return the response with each token in the colour of its difference: blue for the teacher's, red against it."""
    assert entry.response is not None
    text = Text()
    for i, cell in enumerate(cells(entry.response.row)):
        if i == TOKENS:
            text.append(f" ... {entry.response.tokens - i:,} more tokens", "dim")
            break
        size = abs(cell["difference"])
        colour = "blue" if cell["difference"] > 0 else "red"
        style = "" if size < PLAIN else colour if size < SOME else f"bold {colour}"
        text.append(cell["text"], f"{style} reverse" if size >= MUCH else style)
        if cell["breaks"]:
            text.append("\n")
    return text


def _seen(seen: Seen, student: Seen, draws: bool) -> Panel:
    title = Text(plain(f"as {seen.reader} reads it" + (f" ({seen.view})" if seen.view else "")))
    if seen.problem:
        return Panel(Text(plain(seen.problem), "red"), title=title, title_align="left", border_style="dim")
    if seen is not student and seen.same_as(student):
        said = Text("the same ids and images as the student", "dim")
        return Panel(said, title=title, title_align="left", border_style="dim")
    ids = " ".join(map(str, seen.ids[:IDS])) + (f" ... ({len(seen.ids):,} ids)" if len(seen.ids) > IDS else "")
    images = f"{len(seen.items)} image{'' if len(seen.items) == 1 else 's'}"
    about = f"{len(seen.ids):,} ids sent with {images}, {seen.expanded:,} tokens read; ids: {ids}"
    said = Text.assemble(shortened(seen.text), "\n", (about, "dim"))
    other = [] if seen.items == student.items else [file for item in seen.items for file in item]
    pictures = _pictures([base64.b64encode(file).decode() for file in other[:FILES]], draws)
    return Panel(Group(*pictures, said), title=title, title_align="left", border_style="dim")


def _surprises(found: Found, *, coloured: bool) -> Table:
    table = Table(
        title="The most surprising tokens: log-prob by the teacher minus by the student", title_justify="left"
    )
    for column, justify in (("nats", "right"), ("p student", "right"), ("p teacher", "right"), ("token", "left")):
        table.add_column(column, justify=justify, no_wrap=column != "token")  # type: ignore[arg-type]
    table.add_column("response")
    for one in found.surprises:
        row = one.response.row
        colour = "blue" if one.difference > 0 else "red"
        marked = visible(one.token) if coloured else f">>{visible(one.token)}<<"
        token = Text.assemble(_inline(one.before), (marked, f"bold reverse {colour}"), _inline(one.after))
        where = f"{row.task}, step {row.step}, {row.verdict}; {one.place} of {one.response.tokens}"
        table.add_row(f"{one.difference:+.2f}", *(f"{p:.2g}" for p in one.probabilities), token, Text(plain(where)))
    return table


def _inline(text: str) -> str:
    return plain(text).replace("\n", "⏎")


def _files(prompt: Prompt) -> list[bytes]:
    return [file for _, files in shown_items(prompt) for file in files[:FILES]][:FILES]


def _pictures(encoded: list[str], draws: bool) -> Iterator[Text]:
    """Yield images, two pixels a letter; nothing without colours, since the message names the image and its size."""
    for image in encoded[:FILES] if draws else ():
        try:
            with decoded(image) as (_, picture):
                yield _blocks(picture)
        except ValueError as error:
            yield Text(plain(f"an image {error}"), "yellow")


def _blocks(image: Image.Image) -> Text:
    """Return an image as upper halves of blocks: the letter is the upper pixel, its background the lower one."""
    scale = min(COLUMNS / image.width, 2 * ROWS / image.height)
    size = max(1, round(image.width * scale)), max(2, 2 * round(image.height * scale / 2))
    pixels = np.asarray(image.convert("RGB").resize(size)).tolist()  # [height][width][3]
    text = Text()
    for y in range(0, size[1], 2):
        for x in range(size[0]):
            upper, lower = pixels[y][x], pixels[y + 1][x]
            text.append("▀", Style(color=_hex(upper), bgcolor=_hex(lower)))
        text.append("\n")
    text.rstrip()
    return text


def _hex(rgb: Sequence[int]) -> str:
    return f"#{bytes(rgb).hex()}"


def to_dict(found: Found) -> dict[str, Any]:
    """Return what was found as JSON types; images as their sizes, since the files are in the shards."""
    return {
        "inspected": found.what,
        "total": found.total,
        "matching": found.matching,
        "shown": [_to_dict(entry) for entry in found.entries],
        "surprising": [
            {
                "key": one.response.row.key,
                "step": one.response.row.step,
                "task": one.response.row.task,
                "teacher": one.response.row.teacher_name,
                "place": one.place,
                "token": one.token,
                "before": one.before,
                "after": one.after,
                "student_logprob": one.student,
                "teacher_logprob": one.teacher,
            }
            for one in found.surprises
        ],
        "remarks": list(found.remarks),
        "left_out": [{"file": f, "places": places, "more": more} for f, places, more in found.left_out],
    }


def _to_dict(entry: Entry) -> dict[str, Any]:
    said: dict[str, Any] = {"key": entry.key, "tokens": entry.tokens}
    if entry.prompt is not None:
        prompt = entry.prompt
        said |= {
            "task": prompt.task,
            "modality": prompt.modality,
            "messages": list(prompt.messages),
            "answer": prompt.answer,
            "extra": dict(prompt.extra),
            "images": [_size(file) for _, files in shown_items(prompt) for file in files],
        }
    if entry.counts is not None:
        said["difficulty"] = {"right": entry.counts.right, "judged": entry.counts.judged, "is": entry.counts.hardness}
    if entry.response is not None:
        row = entry.response.row
        said["response"] = {
            "step": row.step,
            "task": row.task,
            "text": "".join(row.tokens),
            "outcome": row.verdict,
            "reason": row.reason,
            "teacher": row.teacher_name,
            "kept": row.kept,
            "tokens": entry.response.tokens,
            "reward": entry.response.reward,
            "advantage": entry.response.advantage,
        }
    said["seen"] = [
        {"reader": s.reader, "view": s.view, "ids": list(s.ids), "tokens": s.expanded, "text": s.text,
         "images": [_size(file) for files in s.items for file in files], "problem": s.problem}
        for s in entry.seen
    ]  # fmt: skip
    return said


def _size(file: bytes) -> dict[str, Any]:
    try:
        with Image.open(io.BytesIO(file)) as image:
            return {"width": image.width, "height": image.height, "format": image.format, "bytes": len(file)}
    except (OSError, ValueError, Image.DecompressionBombError):
        return {"width": None, "height": None, "format": None, "bytes": len(file)}
