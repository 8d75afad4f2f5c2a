"""The results table: models down, benchmarks across, and the share of the gap to the teachers that was closed."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from mmopd.errors import DataError
from mmopd.evaluate.score import BenchmarkScore

Kind = Literal["base", "teacher", "distilled"]

NO_GAP = 1.0  # points; with a smaller lead of the best teacher there is no gap to close
GAP_CLOSED = "gap closed"
NONE = "–"
STDERR = "_stderr"  # ends the name of the standard error of a further number
# Settings of a record that decide which other numbers its score can be compared with, as columns of the CSV.
ASKED = (
    *("family", "prompt_variant", "min_pixels", "max_pixels", "pixels_per_token"),
    *("sampling_defaults", "max_tokens", "temperature", "top_p", "seed", "responses", "k", "limit", "reasoning_tags"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A model and its records, one for each benchmark."""

    name: str
    kind: Kind
    records: tuple[BenchmarkScore, ...]

    def record(self, column: str) -> BenchmarkScore | None:
        """Return the record of a benchmark, or None if it was not run on this model."""
        return next((r for r in self.records if r.column == column), None)

    def score(self, column: str) -> float | None:
        """Return the score on 0-100, or None."""
        record = self.record(column)
        return record.score if record else None


@dataclass(frozen=True, slots=True)
class Results:
    """All measurements; renders as a terminal table, Markdown, CSV and JSON."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Results":
        """Collect rows; the columns are in the order in which they first appear."""
        return cls(tuple(dict.fromkeys(r.column for row in rows for r in row.records)), tuple(rows))

    @classmethod
    def read(cls, path: Path) -> "Results":
        """Read the `results.json` that `write` wrote.

        Raises:
            DataError: the file is damaged.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            rows = [
                Row(r["name"], r["kind"], tuple(BenchmarkScore(**record) for record in r["records"]))
                for r in data["rows"]
            ]
            return cls(tuple(data["columns"]), tuple(rows))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DataError(f"{path}: damaged ({error}); `mmopd train --resume {path.parent}` measures again") from None

    def write(self, folder: Path) -> None:
        """Write `results.json`, `results.md` and `results.csv`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        (folder / "results.md").write_text(self.markdown(), encoding="utf-8")
        (folder / "results.csv").write_text(self.csv(), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types, with the closed gaps."""
        rows = [
            {"name": r.name, "kind": r.kind, "records": [dataclasses.asdict(record) for record in r.records]}
            for r in self.rows
        ]
        return {"columns": list(self.columns), "rows": rows, "gap_closed": self.gaps_closed()}

    def gap_closed(self, column: str) -> float | None:
        """Return (distilled - base) / (best teacher - base).

        None if one of the three has no score, or no teacher leads by `NO_GAP` points.
        """
        base = self._best("base", column)
        distilled = self._best("distilled", column)
        teacher = self._best("teacher", column)
        if base is None or distilled is None or teacher is None or teacher - base < NO_GAP:
            return None
        return (distilled - base) / (teacher - base)

    def gaps_closed(self) -> Mapping[str, float | None]:
        """Return `gap_closed` of every column."""
        return {column: self.gap_closed(column) for column in self.columns}

    def failures(self) -> list[BenchmarkScore]:
        """Return the records without a score."""
        return [r for row in self.rows for r in row.records if r.status == "failed"]

    def notes(self) -> list[str]:
        """Return a line for each record with further numbers: its pass@k, and how many of its responses were cut."""
        return [f"{row.name}, {r.column}: {said}" for row in self.rows for r in row.records if (said := further(r))]

    def rich(self, title: str | None = None) -> Table:
        """Render the table for a terminal."""
        table = Table(title=title, title_justify="left", footer_style="bold")
        table.add_column("", footer=GAP_CLOSED if self._compares() else "")
        for column in self.columns:
            table.add_column(escape(column), justify="right", footer=self._gap(column) if self._compares() else "")
        table.show_footer = self._compares()
        style = {"base": None, "teacher": "dim", "distilled": "bold green"}
        for row in self.rows:
            table.add_row(escape(row.name), *(_cell(row.record(c)) for c in self.columns), style=style[row.kind])
        return table

    def markdown(self) -> str:
        """Render a table for a README or an issue, followed by the reasons of failures."""
        lines = ["| " + " | ".join(["", *self.columns]) + " |", "|---|" + "---:|" * len(self.columns)]
        lines += [
            "| " + " | ".join([row.name, *(_cell(row.record(c)) for c in self.columns)]) + " |" for row in self.rows
        ]
        if self._compares():
            lines.append("| " + " | ".join([f"*{GAP_CLOSED}*", *(self._gap(c) for c in self.columns)]) + " |")
        lines += [f"\n{note}" for note in self.notes()]
        lines += [f"\n{r.endpoint}, {r.column}: failed: {r.reason}" for r in self.failures()]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Render one line per model and benchmark: the long form, which spreadsheets can pivot."""
        file = io.StringIO()
        fields = ("column", "task", "metric", "status", "score", "stderr", "n", "seconds", "weights", "data", "reason")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "kind", *fields, *ASKED, "more"])
        for row in self.rows:
            for r in row.records:
                asked = (r.settings.get(key) for key in ASKED)
                more = json.dumps(r.more) if r.more else ""
                writer.writerow([row.name, row.kind, *(getattr(r, f) for f in fields), *asked, more])
        return file.getvalue()

    def _best(self, kind: Kind, column: str) -> float | None:
        scores = [s for row in self.rows if row.kind == kind and (s := row.score(column)) is not None]
        return max(scores, default=None)

    def _compares(self) -> bool:
        return {"base", "teacher", "distilled"} <= {row.kind for row in self.rows}

    def _gap(self, column: str) -> str:
        gap = self.gap_closed(column)
        return NONE if gap is None else f"{gap:.0%}"


def further(record: BenchmarkScore) -> str:
    """Return the further numbers of a record in words; empty if it has none."""
    parts = []
    for name, value in record.more.items():
        if name == "cut":
            parts += [f"{value:.1f} % of the responses were cut"] if value else []
        elif not name.endswith(STDERR):
            error = record.more.get(f"{name}{STDERR}")
            parts.append(f"{name} {value:.1f}" + (f" ± {error:.1f}" if error is not None else ""))
    return ", ".join(parts)


def _cell(record: BenchmarkScore | None) -> str:
    if record is None:
        return NONE
    if record.score is None:
        return "failed"
    return f"{record.score:.1f}" + (f" ± {record.stderr:.1f}" if record.stderr is not None else "")
