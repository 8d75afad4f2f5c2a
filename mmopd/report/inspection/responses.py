"""Choose recorded responses of a run or of a samples.jsonl, and find the rows that they answer."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

from mmopd.errors import DataError, UserError
from mmopd.prompts.measured import latest_counts
from mmopd.prompts.shards import Shards
from mmopd.records import Prompt
from mmopd.report.heatmap import Response, choose
from mmopd.report.inspection.found import Counts, Entry, Filters, Found, by_key, in_turn, surprises
from mmopd.report.inspection.rows import Readers
from mmopd.report.run_files import RunFiles
from mmopd.runtime.run_folder import RunFolder
from mmopd.settings_file import suggest

RESPONSE_TOKENS = 1_000  # of one response; of longer ones the first and the last

Open = Callable[[], Mapping[str, Shards]]


def find_responses(
    what: str, samples: Path, filters: Filters, rows: int, *, open_sources: Open, readers: Readers | None = None
) -> Found:
    """Return the responses that match, in the report's order (wrong ones of the last step first), of each task in turn.

    Args:
        what: what is inspected, in words.
        samples: the file of JSON lines.
        filters: which responses.
        rows: how many.
        open_sources: opens the shards that the run drew from, for the rows and their difficulty.
        readers: how each model reads a prompt.

    Raises:
        UserError: there are no responses, or a filter needs what they do not have.
    """
    folder = RunFolder(samples.parent)
    folder.samples = samples
    files = RunFiles(folder)
    every = files.responses(RESPONSE_TOKENS)
    if not every and not samples.is_file():
        raise UserError(f"{what}: it has no {samples.name} yet; a run writes some responses at its first step")
    _check(what, filters, every)
    sources, remark = _sources(filters, every, open_sources, wanted=readers is not None)
    counts = _counts_of(sources)
    matching = [r for r in every if _matches(r, filters, counts(r.row.key))]
    first, others = choose(matching)
    by_task: dict[str, list[Response]] = defaultdict(list)
    for response in [*first, *others]:
        by_task[response.row.task].append(response)
    entries = []
    for _, response in islice(in_turn(by_task), rows):
        prompt = None
        if sources and response.row.key:
            try:
                prompt = _prompt(sources, response.row.key)
            except DataError as error:
                files.left_out.add(response.row.key, str(error))
        seen = readers(prompt) if readers is not None and prompt is not None else ()
        entries.append(Entry(response.row.key, prompt, None, counts(response.row.key), seen, response))
    remarks = [remark] if remark else []
    return Found(what, entries, len(matching), len(every), surprises(matching), remarks, files.left_out, files)


def _check(what: str, filters: Filters, every: list[Response]) -> None:
    """Refuse a filter whose value no response has."""
    if (filters.source or filters.keys or filters.difficulty) and every and not any(r.row.key for r in every):
        raise UserError(
            f"{what}: an earlier version recorded these responses, without the rows that they answer: they cannot be "
            "chosen by --source, --row or --difficulty"
        )
    there = {name for r in every for name in _teachers(r)}
    if filters.teacher is not None and every and filters.teacher not in there:
        raise UserError(f"--teacher: no response of {filters.teacher!r} in {what}{suggest(filters.teacher, there)}")
    sources = {r.row.key.rpartition("/")[0] for r in every if r.row.key}
    if filters.source is not None and every and filters.source not in sources:
        raise UserError(f"--source: no response to {filters.source!r} in {what}{suggest(filters.source, sources)}")


def _matches(response: Response, filters: Filters, counts: Counts | None) -> bool:
    row = response.row
    return (
        filters.wants(row.key, counts)
        and filters.outcome in (None, row.verdict)
        and (filters.teacher is None or filters.teacher in _teachers(response))
    )


def _teachers(response: Response) -> list[str]:
    """Return the names of the teachers; several are joined by a plus."""
    return [response.row.teacher_name, *response.row.teacher_name.split("+")]


def _sources(
    filters: Filters, every: list[Response], open_sources: Open, *, wanted: bool
) -> tuple[Mapping[str, Shards], str]:
    """Open the shards if the responses name their rows; return a remark if they are needed only for more detail."""
    if not any(response.row.key for response in every):
        return {}, "an earlier version recorded these responses, without the rows that they answer" if wanted else ""
    try:
        return open_sources(), ""
    except UserError as error:
        if wanted or filters.difficulty is not None:
            raise
        return {}, f"rows and difficulty are not shown: {error}"


def _counts_of(sources: Mapping[str, Shards]) -> Callable[[str], Counts | None]:
    """Return a function from the key of a row to its counts."""
    kept = {name: latest_counts(shards) for name, shards in sources.items()}

    def counts(key: str) -> Counts | None:
        name = key.rpartition("/")[0]
        return by_key(kept[name], sources[name].row_of(key)) if name in kept else None

    return counts


def _prompt(sources: Mapping[str, Shards], key: str) -> Prompt:
    name = key.rpartition("/")[0]
    if name not in sources:
        raise DataError(f"the recipe's mixture has no source {name!r}")
    return sources[name][sources[name].row_of(key)]
