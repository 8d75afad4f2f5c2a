"""Read the files of a run folder for the report, in whatever state they are.

A run is reported while it runs, after a crash, and after a disk was full. A part that cannot be read is left out, and
`LeftOut` names it with the reason; all other parts are returned.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from mmopd.evaluate.score import BenchmarkScore
from mmopd.evaluate.table import Results, Row
from mmopd.report.heatmap import Response, TokenRow, clipped
from mmopd.runtime.run_folder import RunFolder

NAMED = 8  # places of a file that are named; the others are counted
FILE_LIMIT = 64 * 2**20  # bytes of a file that is read as a whole; of the lines of metrics.jsonl that are read
RECIPE_LIMIT = 2**20  # bytes
LINE_LIMIT = 64 * 2**20  # bytes
NUMBER_LIMIT = 1e30  # larger values are as useless as infinite ones, and sums of them overflow
STEP_LIMIT = 10**12
CHANGES = 20  # changes of teachers that are shown
ATTEMPTS_LIMIT = 10_000  # bins of a histogram of difficulty
TEXT_LIMIT = 200  # characters of a name or a reason

Metrics = list[dict[str, float | None]]
SCORES = TypeAdapter(BenchmarkScore)
TOKEN_ROWS = TypeAdapter(TokenRow)


class LeftOut:
    """What the page leaves out, by file."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = defaultdict(list)
        self._more: Counter[str] = Counter()
        self.missing: list[str] = []

    def add(self, file: str, what: str) -> None:
        """Name a part of a file that is left out, with the reason."""
        if len(self._places[file]) < NAMED:
            self._places[file].append(short(what))
        else:
            self._more[file] += 1

    def __iter__(self) -> Iterator[tuple[str, list[str], int]]:
        """Yield each file with its places and the number of places that are not named."""
        return ((file, places, self._more[file]) for file, places in self._places.items())

    def __len__(self) -> int:
        return len(self._places)


class Line(NamedTuple):
    """A line of a file of JSON lines."""

    number: int  # from 1
    offset: int  # bytes before it
    row: dict[str, Any]


@dataclass(frozen=True, slots=True, order=True)
class TeacherChange:
    """A teacher that was another one from a step on."""

    step: Annotated[int, Field(ge=0, le=STEP_LIMIT)]
    teacher: str
    what: tuple[str, ...]


TEACHER_CHANGES = TypeAdapter(TeacherChange)


class RunFiles:
    """The files of a run, read as far as they can be read; `left_out` names the rest."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.left_out = LeftOut()

    def there(self) -> bool:
        """Return true if the folder has any file of a run."""
        run = self.run
        return any(path.exists() for path in (run.recipe_file, run.metrics, run.versions, run.results, run.timings))

    def recipe(self) -> tuple[str, dict[str, Any]]:
        """Return the text of the recipe, and its keys; both empty if it cannot be read."""
        text = self._text(self.run.recipe_file, RECIPE_LIMIT) or ""
        try:
            data = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            self._add(self.run.recipe_file, f"not YAML: {_first_line(error)}")
            return text, {}
        if isinstance(data, dict):
            return text, data
        if text or self.run.recipe_file.is_file():
            self._add(self.run.recipe_file, "not a mapping of keys")
        return text, {}

    def versions(self) -> dict[str, str]:
        """Return the versions by package."""
        found = {}
        for name, value in self._object(self.run.versions).items():
            if isinstance(value, str | int | float):
                found[short(name)] = short(str(value))
            else:
                self._add(self.run.versions, f"{name}: not a version")
        return found

    def teacher_changes(self) -> list[TeacherChange]:
        """Return the last changes of teachers at a resume, by step."""
        changes = self._object(self.run.teachers).get("changed", [])
        found = []
        for i, change in enumerate(changes if isinstance(changes, list) else [changes]):
            try:
                found.append(TEACHER_CHANGES.validate_python(change))
            except ValidationError as error:
                self._add(self.run.teachers, f"changed, {i}: {_explain(error)}")
        return sorted(found)[-CHANGES:]

    def stages(self) -> dict[str, float]:
        """Return the seconds of each stage."""
        found = {}
        for name, value in self._object(self.run.timings).items():
            seconds = _number(value)
            if seconds is None or seconds < 0:
                self._add(self.run.timings, f"{name}: {value!r} is no time in seconds")
            else:
                found[short(name)] = seconds
        return found

    def held_out(self) -> Metrics:
        """Return the rows of `held_out.jsonl`; their steps count the updates of the measured weights."""
        return self.metrics(self.run.held_out) if self.run.held_out.exists() else []

    def metrics(self, path: Path | None = None) -> Metrics:
        """Return the rows of `metrics.jsonl` in order of their steps; a value that is not finite is None."""
        path = path or self.run.metrics
        rows: dict[int, dict[str, float | None]] = {}
        repeated = unordered = 0
        bad: Counter[str] = Counter()
        every = max(1, math.ceil(path.stat().st_size / FILE_LIMIT)) if path.is_file() else 1
        if every > 1:
            self._add(path, f"{path.stat().st_size / 2**20:,.0f} MiB: only one line of {every} is read")
        last = -1
        for line in self._lines(path, every):
            try:
                step, numbers = values_of(line.row)
            except ValueError as error:
                self._add(path, f"line {line.number}: {error}")
                continue
            repeated += step in rows
            unordered += step < last
            last = step
            bad.update(name for name, value in line.row.items() if value is not None and numbers[name] is None)
            rows[step] = numbers
        if repeated:
            self._add(path, f"{repeated} lines repeat a step: the last line of each step is shown")
        if unordered:
            self._add(path, f"{unordered} lines are not in the order of their steps: they are sorted")
        for name, count in bad.items():
            self._add(path, f"{name}: {count} values are no finite numbers")
        return [rows[step] for step in sorted(rows)]

    def results(self) -> Results | None:
        """Return the results with all records that can be read; None if there are none."""
        path = self.run.results
        data = self._object(path)
        found: dict[str, Row] = {}
        rows = data.get("rows", [])
        if data and (not isinstance(rows, list) or (not rows and data.get("columns"))):  # without a suite there is none
            self._add(path, "no list of rows")
        for i, row in enumerate(rows if isinstance(rows, list) else []):
            name, kind, records = (row.get(k) if isinstance(row, dict) else None for k in ("name", "kind", "records"))
            if not isinstance(name, str) or kind not in ("base", "teacher", "distilled"):
                self._add(path, f"row {i}: name {name!r} and kind {kind!r} are no model")
            elif name in found or (kind != "teacher" and any(r.kind == kind for r in found.values())):
                self._add(path, f"row {i}: {name} ({kind}) is there twice; the first is shown")
            else:
                found[name] = Row(short(name), kind, tuple(self._records(name, records)))
        results = Results.of(list(found.values()))
        return results if results.columns else None

    def responses(self, limit: int, path: Path | None = None) -> list[Response]:
        """Return the responses of `samples.jsonl`, or of `path`, without images, each with at most `limit` tokens."""
        path = self.run.samples if path is None else path
        found = []
        for line in self._lines(path):
            try:
                row = TOKEN_ROWS.validate_python(line.row)
                row.check()
            except ValidationError as error:
                self._add(path, f"line {line.number}: {_explain(error)}")
            except ValueError as error:
                self._add(path, f"line {line.number}: {_first_line(error)}")
            else:
                found.append(clipped(row, limit, path, line.offset))
        return found

    def images(self, response: Response) -> list[str]:
        """Return the images of a response, in base64; none if another file has taken the place of the one read.

        A run replaces the file of the newest responses again and again, which is no damage.
        """
        try:
            with response.file.open("rb") as file:
                file.seek(response.offset)
                row = object_of(file.readline())
            return list(map(str, row["images"])) if row["step"] == response.row.step else []
        except (OSError, ValueError, LookupError, TypeError) as error:
            if response.file != self.run.newest:
                self._add(response.file, f"step {response.row.step}: no images: {_first_line(error)}")
            return []

    def difficulty(self) -> dict[str, Any]:
        """Return `Measured` of each source of `difficulty.json`."""
        path = self.run.difficulty / "difficulty.json"
        sources = self._object(path).get("sources", {})
        if not isinstance(sources, dict):
            self._add(path, "sources: not a mapping")
            return {}
        if not sources:
            return {}
        from mmopd.prompts.measured import Measured  # loads numpy, which a page without this part does not need

        adapter = TypeAdapter(Measured)
        found = {}
        for name, source in sources.items():
            try:
                measured = adapter.validate_python(source)
            except ValidationError as error:
                self._add(path, f"{name}: {_explain(error)}")
                continue
            if problem := _of_source(measured.correct, measured.attempts, measured.weights):
                self._add(path, f"{name}: {problem}")
            else:
                found[short(name)] = measured
        return found

    def _records(self, name: str, records: object) -> Iterator[BenchmarkScore]:
        path = self.run.results
        if not isinstance(records, list):
            self._add(path, f"{name}: no list of records")
            return
        for i, record in enumerate(records):
            column = record.get("column", i) if isinstance(record, dict) else i
            try:
                score = SCORES.validate_python(record)
            except ValidationError as error:
                self._add(path, f"{name}, {column}: {_explain(error)}")
                continue
            if score.score is not None and not 0 <= score.score <= 100:  # false for NaN, too
                self._add(path, f"{name}, {column}: score {score.score} is not between 0 and 100")
            elif score.stderr is not None and not 0 <= score.stderr <= 100:
                self._add(path, f"{name}, {column}: standard error {score.stderr} is not between 0 and 100")
            elif score.n is not None and score.n <= 0:
                self._add(path, f"{name}, {column}: {score.n} questions")
            else:
                yield score

    def _object(self, path: Path) -> dict[str, Any]:
        text = self._text(path)
        if text is None:
            return {}
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            self._add(path, f"not JSON: {_first_line(error)}" if text.strip() else "empty")
            return {}
        if not isinstance(data, dict):
            self._add(path, f"not a JSON object, but {type(data).__name__}")
            return {}
        return data

    def _text(self, path: Path, limit: int | None = None) -> str | None:
        """Return the text of a file; None, with a reason in `left_out`, if there is none."""
        if not self._is_file(path):
            return None
        limit = FILE_LIMIT if limit is None else limit
        try:
            if (size := path.stat().st_size) > limit:
                self._add(path, f"{size / 2**20:,.1f} MiB: at most {limit / 2**20:.0f} MiB are read")
                return None
            return path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self._add(path, f"not UTF-8 text: {_first_line(error)}")
        except OSError as error:
            self._add(path, f"cannot be read: {error.strerror}")
        return None

    def _lines(self, path: Path, every: int = 1) -> Iterator[Line]:
        """Yield the JSON objects of a file of JSON lines, one of `every` lines and the last."""
        if not self._is_file(path):
            return
        try:
            with path.open("rb") as file:
                yield from self._of_file(path, file, every)
        except OSError as error:
            self._add(path, f"cannot be read: {error.strerror}")

    def _of_file(self, path: Path, file: Any, every: int) -> Iterator[Line]:
        number = offset = 0
        end = path.stat().st_size
        if not end:
            self._add(path, "empty")
        while text := file.readline(LINE_LIMIT):
            here, number = offset, number + 1
            offset += len(text)
            if len(text) == LINE_LIMIT and not text.endswith(b"\n"):
                self._add(path, f"line {number}: longer than {LINE_LIMIT / 2**20:.0f} MiB")
                while (rest := file.readline(LINE_LIMIT)) and not rest.endswith(b"\n"):
                    offset += len(rest)
                offset += len(rest)
            elif not text.endswith(b"\n"):
                self._add(path, f"line {number}: cut short")
            elif every == 1 or number % every == 1 or offset == end:
                try:
                    yield Line(number, here, object_of(text))
                except ValueError as error:
                    self._add(path, f"line {number}: {error}")

    def _is_file(self, path: Path) -> bool:
        if path.is_file():
            return True
        if path.is_symlink() or path.exists():
            self._add(path, "not a regular file")
        else:
            self.left_out.missing.append(str(path.relative_to(self.run.root)))
        return False

    def _add(self, path: Path, what: str) -> None:
        self.left_out.add(str(path.relative_to(self.run.root)), what)


def object_of(line: bytes) -> dict[str, Any]:
    """Return the JSON object in a line.

    Raises:
        ValueError: there is none; the message says what is there.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {_first_line(error)}" if line.strip() else "empty") from None
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object, but {type(row).__name__}")
    return row


def values_of(row: Mapping[str, Any]) -> tuple[int, dict[str, float | None]]:
    """Return the step of a row of metrics, and its values; one that is not finite is None.

    Raises:
        ValueError: the row has no step.
    """
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= STEP_LIMIT:
        raise ValueError(f"step {step!r} is no number of a step")
    return step, {str(name): _number(value) for name, value in row.items()} | {"step": step}


def short(text: str, limit: int = TEXT_LIMIT) -> str:
    """Return the text, cut at `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _number(value: object) -> float | None:
    """Return a finite number as a float; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -NUMBER_LIMIT < value < NUMBER_LIMIT:
        return None
    return float(value)


def _of_source(correct: Iterable[int], attempts: Iterable[int], weights: Iterable[float]) -> str:
    """Return what is wrong with the counts of a source; empty if nothing is."""
    counts = [*map(len, map(tuple, (correct, attempts, weights)))]
    if len(set(counts)) > 1 or not counts[0]:
        return f"{counts[0]} counts of right answers, {counts[1]} of attempts and {counts[2]} weights"
    if not all(0 <= c <= k <= ATTEMPTS_LIMIT for c, k in zip(correct, attempts, strict=True)):
        return "a row has more right answers than attempts, or a count that is none"
    if not all(0 <= weight < NUMBER_LIMIT for weight in weights) or not any(weights):
        return "a weight is negative or not finite, or all are 0"
    return ""


def _explain(error: ValidationError) -> str:
    """Return the first problem of a validation in a line."""
    first: Mapping[str, Any] = error.errors(include_url=False, include_context=False, include_input=False)[0]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    where = ".".join(map(str, first["loc"]))
    return f"{where + ': ' if where else ''}{first['msg']}{more}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
