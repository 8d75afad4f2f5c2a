"""Views of `mmopd prepare`: the first rows as they will be asked, and what became of all examples."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from mmopd.prompts.mixture_view import contents
from mmopd.prompts.prepare import Count, First
from mmopd.prompts.row_parts import Item, messages, shortened
from mmopd.prompts.shards import Shards
from mmopd.records import Prompt


def title(first: First) -> str:
    """Return the name of a row, its task and its tokens."""
    prompt = first.prompt
    key = "" if prompt.key == str(first.number) else f", {shortened(prompt.key, 80, 1)!r}"
    tokens = "" if first.tokens is None else f", {first.tokens:,} tokens"
    return f"example {first.number}{key}: {prompt.task} ({prompt.modality}){tokens}"


def asked(rows: Sequence[First]) -> RenderableType:
    """Render rows as they will be asked."""
    head = f"the first {len(rows)} rows as they will be asked:"
    return Group(head, *(Panel(_row(first.prompt), title=Text(title(first)), title_align="left") for first in rows))


def _row(prompt: Prompt) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for role, parts in messages(prompt):
        table.add_row(role, _message(parts))
    table.add_row("answer", Text(shortened(prompt.answer), "bold"))
    for name, text in prompt.extra.items():
        table.add_row(Text(shortened(name, 30, 1)), Text(shortened(text)))
    return table


def _message(parts: Sequence[str | Item]) -> Text:
    """Return the parts of a message; items before the first text stand on lines of their own, others inside of it."""
    text = Text()
    begun = False
    for part in parts:
        if isinstance(part, Item):
            text.append(f" [{part.label}] " if begun else f"[{part.label}]\n", "cyan")
        else:
            begun = True
            text.append(shortened(part.strip()))
    return text


def outcome(count: Count) -> str:
    """Return what became of the examples, as one line."""
    bad = sum(count.left_out.values())
    return f"of {count.examples:,} examples: {count.rows:,} rows, {count.not_wanted:,} not wanted, {bad:,} bad"


def left_out(count: Count) -> list[RenderableType]:
    """Render the causes why examples were left out, each with the first few; nothing if none was."""
    if not count.left_out:
        return []
    table = Table("left out", "because", "the first of them", show_lines=True)
    table.columns[0].justify = "right"
    for cause, n in count.left_out.most_common():
        first = "\n".join(shortened(one, 300, 3) for one in count.shown[cause])
        table.add_row(f"{n:,}", Text(shortened(cause, 60, 1)), Text(first))
    return [table]


def prepared(shards: Shards, count: Count) -> RenderableType:
    """Render the result of `mmopd prepare`: totals, and the examples left out, with the first few of each cause."""
    made = f"{shards.folder}: {contents(shards.totals())}, {shards.bytes / 2**20:,.1f} MiB"
    return Group(escape(made), escape(outcome(count)), *left_out(count))
