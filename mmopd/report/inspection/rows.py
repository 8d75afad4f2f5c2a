"""Choose rows of shards: by key, difficulty and teacher from the indices alone; only rows that are shown are read."""

from collections.abc import Callable, Collection, Mapping

from mmopd.errors import DataError, UserError
from mmopd.prompts.measured import latest_counts
from mmopd.prompts.shards import Shards
from mmopd.records import Prompt
from mmopd.report.inspection.found import Entry, Filters, Found, Seen, by_key, in_turn
from mmopd.report.run_files import LeftOut
from mmopd.settings_file import suggest

MAX_BAD = 100  # rows that cannot be read, after which no more are tried

Teachers = Callable[[str, str], Collection[str]]  # (task, modality) -> names of the teachers
Readers = Callable[[Prompt], tuple[Seen, ...]]


def find_rows(
    what: str,
    sources: Mapping[str, Shards],
    filters: Filters,
    rows: int,
    *,
    within: range | None = None,
    teachers: Teachers | None = None,
    readers: Readers | None = None,
) -> Found:
    """Return the first rows that match, taken from the sources in turn.

    Args:
        what: what is inspected, in words.
        sources: by name.
        filters: which rows.
        rows: how many.
        within: numbers of rows, for shards of which only one tar is inspected.
        teachers: of a prompt, for `filters.teacher`.
        readers: how each model reads a prompt.

    Raises:
        UserError: a source, key or difficulty that is not there, or a filter for responses.
    """
    if filters.outcome is not None:
        raise UserError(f"--outcome: {what} has prompts without answers; give a run, or its samples.jsonl")
    if filters.teacher is not None and teachers is None:
        raise UserError("--teacher: the recipe says which teacher gets a prompt; give it with --recipe")
    if filters.source is not None and filters.source not in sources:
        raise UserError(f"--source: no source {filters.source!r} in {what}{suggest(filters.source, sources)}")
    chosen = {name: shards for name, shards in sources.items() if filters.source in (None, name)}
    counts = {name: latest_counts(shards) for name, shards in chosen.items()}
    if filters.difficulty is not None and not any(counts.values()):
        raise UserError(f"--difficulty: no counts next to {what}; `mmopd difficulty RECIPE` measures them")
    matching = {name: _matching(shards, filters, counts[name], within, teachers) for name, shards in chosen.items()}
    there = {key for shards in chosen.values() for key in filters.keys if _position(shards, key) is not None}
    if missing := sorted({*filters.keys} - there):
        raise UserError(f"--row: no row {missing[0]!r} in {what}, whose rows are {_keys(chosen)}")
    left_out = LeftOut()
    entries: list[Entry] = []
    bad = 0
    for name, row in in_turn(matching):
        if len(entries) == rows:
            break
        shards = chosen[name]
        try:
            prompt = shards[row]
        except DataError as error:
            left_out.add(name, str(error))
            bad += 1
            if bad == MAX_BAD:
                left_out.add(what, f"{bad} rows cannot be read; no more were tried")
                break
            continue
        seen = readers(prompt) if readers is not None else ()
        entries.append(Entry(prompt.key, prompt, shards.tokens(row), by_key(counts[name], row), seen))
    return Found(what, entries, sum(map(len, matching.values())), sum(map(len, sources.values())), left_out=left_out)


def _matching(
    shards: Shards,
    filters: Filters,
    counts: Mapping[int, tuple[int, int]],
    within: range | None,
    teachers: Teachers | None,
) -> range | list[int]:
    """Return the numbers of the rows that match, from the index alone."""
    every = range(len(shards)) if within is None else within
    if filters.keys:
        rows = sorted({row for key in filters.keys if (row := _position(shards, key)) is not None and row in every})
    elif filters.difficulty is None and filters.teacher is None:
        return every
    else:
        rows = list(every)
    if filters.difficulty is not None:
        rows = [row for row in rows if filters.wants(shards.key(row), by_key(counts, row))]
    if filters.teacher is not None and teachers is not None:
        gets = {kind: filters.teacher in teachers(*kind) for kind in shards.kinds}
        rows = [row for row in rows if gets[shards.kind(row)]]
    return rows


def _position(shards: Shards, key: str) -> int | None:
    """Return the position of a row; None if these shards do not have it, or leave it out."""
    source, _, number = key.rpartition("/")
    if source != shards.name or not (number.isascii() and number.isdecimal()) or len(number) > 12:
        return None
    row = shards.row_of(key)
    return row if row < len(shards) and shards.key(row) == key else None


def _keys(sources: Mapping[str, Shards]) -> str:
    return ", ".join(f"{shards.key(0)} to {shards.key(len(shards) - 1)}" for shards in sources.values())
