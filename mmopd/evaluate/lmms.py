"""The bridge to lmms-eval: one process for each benchmark, against a model that is already served.

lmms-eval exits with status 0 even if nothing ran, scores a failed request as a wrong answer, and by default judges
mathematics in threads, where the judge cannot work. The flags of `_arguments` and the checks of `validate` correct
this: a benchmark has a score only if every check passes; otherwise it has *failed*, with a reason and no score.
lmms-eval's own cache is not used: it knows neither the weights nor which requests failed.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from mmopd import settings_file
from mmopd.config import Benchmark, Suite
from mmopd.errors import ConfigError, DataError, UserError
from mmopd.evaluate.calls import Calls
from mmopd.evaluate.served import Served
from mmopd.evaluate.tasks import Task, prepare
from mmopd.evaluate.validate import InvalidRunError, Measured, last_words, validate
from mmopd.runtime import http
from mmopd.serving.endpoint import Endpoint
from mmopd.settings_errors import described
from mmopd.workspace import is_file

SIDE_BY_SIDE = 2  # calls in parallel: one waits for the server while the other judges
PACKAGES = (
    "lmms-eval",
    "math-verify",
    "latex2sympy2_extended",
    "transformers",
    "datasets",
    "openai",
)  # packages whose version can change a score
NOT_A_NAME = (
    "o1",
    "o3",
    "o4",
    "gpt-5",
)  # lmms-eval takes a model with such a name for one of OpenAI's, and drops the temperature

# Called with a benchmark and its score, which is None when the benchmark starts.
OnEvent = Callable[[Benchmark, "BenchmarkScore | None"], None]


@dataclasses.dataclass(frozen=True, slots=True)
class BenchmarkScore:
    """One benchmark of one model: a score, or the reason why there is none."""

    endpoint: str
    role: str
    column: str
    task: str
    metric: str
    status: Literal["ok", "failed"]
    reason: str  # empty if ok
    score: float | None  # 0-100
    stderr: float | None  # of the score; None if the task has none
    n: int | None  # questions
    weights: str  # hash of the model's files, or empty
    data: str  # hash of the local data, or empty for the task's own
    settings: Mapping[str, Any]  # how it was asked; of a failed benchmark, as far as the suite says it
    versions: Mapping[str, str]
    seconds: float
    reused: bool = False

    @classmethod
    def read(cls, path: Path) -> "BenchmarkScore":
        """Read a record that `write` wrote.

        Raises:
            DataError: the file is damaged.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: damaged ({error}); delete it to measure again") from None

    def write(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")
        partial.replace(path)


def read_suite(path: Path, workspace: Path) -> Suite:
    """Read a suite and make its paths absolute: task files from the suite's folder, data from the workspace.

    Raises:
        ConfigError: the file cannot be read, two columns have the same name, or a task file is missing.
    """
    suite = settings_file.read(Suite, path)
    columns = [b.column for b in suite.benchmarks]
    for column in columns:
        if columns.count(column) > 1:
            raise ConfigError(f"{path}: two benchmarks have the column {column!r}; rename one of them")
    benchmarks = []
    for benchmark in suite.benchmarks:
        update: dict[str, Any] = {}
        if benchmark.task.endswith((".yaml", ".yml")):
            update["task"] = str(path.parent.absolute() / benchmark.task)
            if not is_file(Path(update["task"])):
                raise ConfigError(
                    f"{path}: {benchmark.column}: no task file {described(benchmark.task)} in {path.parent}"
                )
        if benchmark.data is not None:
            update["data"] = workspace.absolute() / benchmark.data
        benchmarks.append(benchmark.model_copy(update=update))
    return suite.model_copy(update={"benchmarks": tuple(benchmarks)})


def evaluate(
    endpoint: Endpoint,
    suite: Suite,
    *,
    out: Path,
    weights: str = "",
    served: Served | None = None,
    cache: Path | None = None,
    objection: Callable[[], str] = lambda: "",
    on_event: OnEvent = lambda benchmark, record: None,
) -> list[BenchmarkScore]:
    """Measure a served model on every benchmark of a suite (of `read_suite`).

    Args:
        out: gets a folder per benchmark with the log, lmms-eval's own results and the record; an earlier folder is
            replaced.
        weights: hash of the served model's files (`hash_model`), part of the key under which a record is reused.
        served: what is known of the model; its family decides the prompts, unless the suite does.
        cache: folder where valid records are kept and found again; only used with `weights`.
        objection: called after each measurement; returns a reason why it does not count, or "".
        on_event: called from two threads.

    Returns:
        One record per benchmark, in the suite's order; its status is failed if the benchmark could not be measured.

    Raises:
        UserError: lmms-eval is not installed.
        ConfigError: a task is missing, or lmms-eval would misread the model name.
        DataError: the data of a task is missing.
    """
    versions = _versions()
    _check_name(endpoint.model)
    known = served or Served()
    jobs = []
    for benchmark in suite.benchmarks:
        folder = out / _slug(endpoint.name) / _slug(benchmark.column)
        shutil.rmtree(folder, ignore_errors=True)
        jobs.append(
            _Job(
                endpoint,
                suite,
                benchmark,
                prepare(benchmark, folder / "task", suite.prompt_variant or known.variant),
                folder,
                weights,
                known,
                versions,
                cache,
                objection,
            )
        )
    with (
        ThreadPoolExecutor(SIDE_BY_SIDE) as pool,
        Calls() as calls,
    ):  # exited in reverse order: first the calls end, then the threads
        running = [pool.submit(job.run, calls, on_event) for job in jobs]
        try:
            return [future.result() for future in running]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """One benchmark of one model, yet to be run."""

    endpoint: Endpoint
    suite: Suite
    benchmark: Benchmark
    task: Task
    folder: Path
    weights: str
    served: Served
    versions: Mapping[str, str]
    cache: Path | None
    objection: Callable[[], str]

    def run(self, calls: Calls, on_event: OnEvent) -> BenchmarkScore:
        on_event(self.benchmark, None)
        kept = self.cache / f"{self._key()}.json" if self.cache is not None and self.weights else None
        if kept is not None and kept.is_file():
            name = self.endpoint.name
            role = self.endpoint.role
            record = dataclasses.replace(
                BenchmarkScore.read(kept), endpoint=name, role=role, column=self.benchmark.column, reused=True
            )
        else:
            record = self._measure(calls)
            if kept is not None and record.status == "ok":
                record.write(kept)
        record.write(self.folder / "record.json")
        on_event(self.benchmark, record)
        return record

    def _measure(self, calls: Calls) -> BenchmarkScore:
        begin = time.monotonic()
        measured: Measured | None = None
        try:
            measured = self._call(calls)
            reason = self.objection()
        except InvalidRunError as why:
            reason = str(why)
        if reason:
            measured = None
        return BenchmarkScore(
            endpoint=self.endpoint.name,
            role=self.endpoint.role,
            column=self.benchmark.column,
            task=self.benchmark.task if not Path(self.benchmark.task).is_absolute() else Path(self.benchmark.task).name,
            metric=self.benchmark.metric,
            status="failed" if measured is None else "ok",
            reason=reason,
            score=measured.score if measured else None,
            stderr=measured.stderr if measured else None,
            n=measured.n if measured else None,
            weights=self.weights,
            data=self.task.data,
            settings={**self._settings(), **(measured.sent if measured else {})},
            versions={**self.versions, **(measured.versions if measured else {})},
            seconds=round(time.monotonic() - begin, 2),
        )

    def _call(self, calls: Calls) -> Measured:
        output = self.folder / "output"
        log = self.folder / "log.txt"
        output.mkdir(parents=True)
        local = self.benchmark.data is not None
        status = calls.run(self._arguments(output), log, self._environment(), offline=local, timeout=self.suite.timeout)
        if status is None:
            raise InvalidRunError(f"not finished after {self.suite.timeout} s (`timeout` of the suite); log: {log}")
        if status != 0:
            raise InvalidRunError(f"lmms-eval ended with status {status}: {last_words(log)}; log: {log}")
        return validate(output, self.task.name, self.benchmark, self.task.rows)

    def _arguments(self, output: Path) -> list[str]:
        b = self.benchmark
        options = {
            "--model": "openai",
            "--model_args": f"model={self.endpoint.model},num_concurrent={self.suite.concurrency},max_retries=3",
            "--tasks": self.task.name,
            "--output_path": str(output),
            # math-verify's time limit is a signal, which raises in threads: every answer would count as wrong
            "--process_docs_parallel": "1",
            "--verbosity": "DEBUG",  # with any other level, an exception ends with status 0
        }
        if b.reasoning_tags == "none":  # the default strips <think>...</think>, before the format is judged
            options["--reasoning_tags"] = "none"
        if self.task.folder is not None:
            options["--include_path"] = str(self.task.folder)
        if b.max_tokens is not None:
            options["--gen_kwargs"] = f"max_new_tokens={b.max_tokens}"
        if b.limit is not None:
            options["--limit"] = str(b.limit)
        return ["--log_samples", *(word for option in options.items() for word in option)]

    def _environment(self) -> dict[str, str]:
        """Return the variables that name the model; on the command line everybody could see the key."""
        url = self.endpoint.url.rstrip("/")
        return {
            "OPENAI_API_KEY": self.endpoint.api_key or "none",
            "OPENAI_API_BASE": url if url.endswith("/v1") else f"{url}/v1",
            "LMMS_IMAGE_ENCODE_FORMAT": "PNG",  # images reach the server with their own size and pixels
            **http.environment(url, self.endpoint.proxy),
        }

    def _settings(self) -> dict[str, Any]:
        wanted = ("metric", "scale", "max_tokens", "reasoning_tags", "limit")
        return {
            **{key: getattr(self.benchmark, key) for key in wanted},
            **dataclasses.asdict(self.served),
            "prompt_variant": self.task.variant,
        }

    def _key(self) -> str:
        parts = [self.weights, self.task.name, self.task.code, self.task.data, self._settings(), self.versions]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            if package == "lmms-eval":
                raise UserError("lmms-eval is not installed; `pip install 'mmopd[eval]'` installs it") from None
    return found


def _check_name(model: str) -> None:
    for part in NOT_A_NAME:
        if part in model:
            raise ConfigError(
                f"the served model is called {model!r}: lmms-eval takes every name with {part!r} in it for a model of "
                "OpenAI, and drops temperature and token limit; serve it under another name"
            )
    if not re.fullmatch(r"[\w./:@+-]+", model):
        raise ConfigError(
            f"the served model is called {model!r}: lmms-eval reads commas, blanks and `=` as syntax; serve it under "
            "another name"
        )


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)
