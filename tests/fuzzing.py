"""Odd rows through prepare, index, plan and encode: each is kept or left out for its cause, and the totals balance."""

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import odd_values
from odd_rows import LATE_TASK, LINE_CAUSES, NOT_WANTED, OTHERS, Row, Tar, draw, write_late, write_tables, write_tars
from odd_values import Key

from mmopd.errors import DataError
from mmopd.modality import Encoder
from mmopd.modality.registry import MEDIA, check_items
from mmopd.prompts import PromptPlan, Rows, Shards, TokenCounter, index_tar
from mmopd.prompts.prepare import prepare
from mmopd.prompts.rows import RowError
from mmopd.records import Encoded
from mmopd.task.load import load_tasks

GENERIC = Path(__file__).parents[1] / "data" / "generic.py"
TARS = ("additions", "digit_sum")  # tasks of which tars are written, too
IN_TARS = 0.3  # share of the rows


@dataclass
class Totals:
    """Rows by what became of them.

    Attributes:
        rows: rows that were made.
        left: (stage, cause) -> rows that prepare or index left out.
        kept: rows in the shards.
        drawn: rows that the plan drew, each at least once.
        encoded: of those, rows that could be used.
        replaced: cause -> rows that could not.
        judged: answers that verifiers judged.
        faults: what should not be.
        sources: the shards by name, each with its task.
        keys: the answer key of each row of a source that was prepared.
    """

    rows: int = 0
    left: Counter[tuple[str, str]] = field(default_factory=Counter)
    kept: int = 0
    drawn: int = 0
    encoded: int = 0
    replaced: Counter[str] = field(default_factory=Counter)
    judged: int = 0
    faults: list[str] = field(default_factory=list)
    sources: dict[str, tuple[Path, str]] = field(default_factory=dict)
    keys: dict[str, Key] = field(default_factory=dict)

    def check(self, right: bool, fault: str) -> None:
        """Note a fault unless `right`."""
        if not right:
            self.faults.append(fault)

    def balance(self) -> None:
        """Note totals that do not balance."""
        out = self.kept + self.left.total()
        self.check(self.rows == out, f"{self.rows} rows came in, and {out} were kept or left out")
        out = self.encoded + self.replaced.total()
        self.check(self.drawn == out, f"{self.drawn} rows were drawn, and {out} were used or replaced")


def fuzz(folder: Path, rows: int, seed: int, student: Path) -> Totals:
    """Make rows from a seed and take them through prepare, index, plan and encode.

    Args:
        folder: a new folder for data and shards.
        student: folder with the student's processor.
    """
    rng = random.Random(seed)
    totals = Totals()
    for task in TARS:
        written = write_tars(rng, task, int(rows * IN_TARS / len(TARS)), folder / "tars" / task)
        _index(totals, f"tars_{task}", task, written, student)
    _index(totals, "late", LATE_TASK, [write_late(folder / "tars" / "late")], student)
    for i, task in enumerate(odd_values.KEYS):
        n = round((rows - totals.rows) / (len(odd_values.KEYS) - i))
        _prepare(totals, task, draw(rng, task, n - n // OTHERS), folder, student)
    encoder = Encoder(student)
    for name, (shards, _) in totals.sources.items():
        _plan(totals, name, Shards(shards, name), encoder, seed)
    totals.balance()
    return totals


def _index(totals: Totals, name: str, task: str, written: list[Tar], student: Path) -> None:
    """Index tars of other tools, and remove those that are refused."""
    counter = TokenCounter(student)
    totals.rows += sum(tar.rows for tar in written)
    for tar in written:
        try:
            index_tar(tar.path, counter)
        except DataError as error:
            totals.check(not tar.good, f"index refuses {tar.kind}: {error}")
            totals.check(str(tar.path) in str(error), f"no name of the tar in {error}")
            totals.left["index", tar.kind] += tar.rows
            tar.path.unlink()
        except Exception as error:
            totals.faults.append(f"index of {tar.kind}: {error!r}")
        else:
            totals.check(tar.good, f"index takes {tar.kind}")
            totals.kept += tar.rows
    totals.sources[name] = (written[0].path.parent, task)


def _prepare(totals: Totals, task: str, rows: list[Row], folder: Path, student: Path) -> None:
    """Prepare tables of a task, and compare each row with what it should become."""
    data, out = folder / "data" / task, folder / "shards" / task
    lines = write_tables(random.Random(task), rows, data)
    image = ["images=image"] if "image" in rows[0].fields else []
    settings = [f"data={data}", f"task={task}", "number=id", *image]
    shards, count = prepare(GENERIC, out, settings, processor=student, max_bad=1.0, max_rows=200)
    totals.kept += count.rows
    totals.left.update({("prepare", cause): times for cause, times in count.left_out.items()})
    totals.left["prepare", NOT_WANTED] += count.not_wanted
    made = len(rows) + lines
    totals.rows += made
    totals.check(count.examples == made, f"{task}: {count.examples} of {made} examples were read")
    _compare(totals, task, rows, set(_ids(out)), count.left_out)
    by_id = {row.id: row for row in rows if "duplicate key" not in row.due}
    for id, prompt in zip(_ids(out), shards, strict=True):
        totals.keys[prompt.key] = by_id[id].key
        _judge(totals, task, by_id[id].key, prompt.answer)
    totals.sources[task] = (out, task)


def _ids(shards: Path) -> Iterator[str]:
    """Yield the keys that the rows of a source were given."""
    from mmopd.prompts.index import Index

    for tar in sorted(shards.glob("*.tar")):
        index = Index.load(tar)
        for row in range(len(index)):
            yield json.loads(index.read(tar, row)[0])["id"]


def _compare(totals: Totals, task: str, rows: list[Row], kept: set[str], left: Counter[str]) -> None:
    """Note rows that were kept though they should not be, left out though they should not be, and causes unheard of."""
    for row in rows:
        if "duplicate key" in row.due:
            continue
        told = f"{task}: {str(row.fields)[:300]}"
        totals.check(not (row.due and row.id in kept), f"kept, though due are {row.due}: {told}")
        totals.check(bool(row.due) or row.open or row.id in kept, f"left out without a cause: {told}")
    known = set().union(LINE_CAUSES, {"bad image"}, *(row.due for row in rows))
    totals.check(set(left) <= known, f"{task}: causes {set(left) - known}")
    for cause in known - LINE_CAUSES - {NOT_WANTED}:
        least = sum(row.due == {cause} and not row.open for row in rows)
        most = sum(cause in row.due or row.open for row in rows)
        totals.check(least <= left[cause] <= most, f"{task}: {left[cause]} x {cause!r}, due are {least} to {most}")


def _judge(totals: Totals, task: str, key: Key, answer: str) -> None:
    """Give the verifier the right and the wrong answers of a key."""
    for answers, least, most in ((key.right, 1.0, 1.0), (key.wrong, 0.0, 0.0)):
        for text in answers:
            value = _verdict(task, odd_values.answered(task, text), answer)
            totals.judged += 1
            totals.check(least <= value <= most, f"{task}: {text!r} is {value} for the key {answer[:100]!r}")


@cache
def _verdict(task: str, response: str, answer: str) -> float:
    return load_tasks()[task].verify(response, answer).value


def _plan(totals: Totals, name: str, shards: Shards, encoder: Encoder, seed: int) -> None:
    """Draw every row of a source, and encode it as a run does."""

    def use(source: str, row: int) -> Encoded:
        encoded = encoder.encode(shards[row])
        try:
            check_items(encoded.prompt)
        except ValueError as error:
            raise RowError("undecodable", str(error)) from None
        return encoded

    plan = PromptPlan({name: Rows(len(shards), shards.fingerprint)}, {name: 1}, seed)
    numbers = {f"{name}/{row}": row for row in range(len(shards))}
    while plan.epochs()[name] < 1:
        (encoded,) = plan.read(1, use)
        totals.encoded += 1
        _check_encoded(totals, encoded, encoder, shards.tokens(numbers.get(encoded.prompt.key, 0)))
    totals.drawn += round(plan.epochs()[name] * len(shards))
    totals.replaced.update({cause: times for (_, cause), times in plan.replaced.items()})


def _check_encoded(totals: Totals, encoded: Encoded, encoder: Encoder, counted: int | None) -> None:
    """Check that tokens and patches are those that were counted, and that only the template made control tokens."""
    key, prompt = encoded.prompt.key, encoded.prompt
    totals.check(len(encoded.expanded) == counted, f"{key}: {len(encoded.expanded)} tokens, and {counted} were counted")
    placeholders = sum(encoded.ids.count(token) for token in encoder.tokens.values())
    items = sum(len(prompt.items(medium)) for medium in MEDIA)
    turns = encoded.ids.count(encoder.tokenizer.convert_tokens_to_ids("<|im_start|>"))
    totals.check(placeholders == items, f"{key}: {placeholders} placeholders for {items} images")
    totals.check(turns == len(prompt.messages) + 1, f"{key}: {turns} turns of a chat of {len(prompt.messages)}")
    if encoded.grids:
        _, grids = encoder.pixel_values(encoded)
        totals.check(grids.tolist() == [list(grid) for grid in encoded.grids], f"{key}: grids {grids.tolist()}")
