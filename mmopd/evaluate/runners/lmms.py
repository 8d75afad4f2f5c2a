"""The bridge to lmms-eval: one process for each benchmark, against a model that is already served.

lmms-eval exits with status 0 even if nothing ran, scores a failed request as a wrong answer, and by default judges
mathematics in threads, where the judge cannot work. The flags of `arguments` and the checks of `validate` correct
this: a benchmark has a score only if every check passes; otherwise it has *failed*, with a reason and no score.
lmms-eval's own cache is not used: it knows neither the weights nor which requests failed.
"""

import importlib.metadata
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

from mmopd.config.suite import LmmsBenchmark
from mmopd.errors import ConfigError, UserError
from mmopd.evaluate import calls, second_rule
from mmopd.evaluate.calls import Calls
from mmopd.evaluate.runners.base import Asked, Done, Job
from mmopd.evaluate.score import InvalidRunError, Measured
from mmopd.evaluate.tasks import Task, prepare
from mmopd.evaluate.validate import last_words, validate
from mmopd.runtime import http
from mmopd.serving.endpoint import Endpoint

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
JUDGED = re.compile(r"(?<![a-z])gpt(?![a-z])|llm_(as_)?judge")  # in the names of metrics that a model gives
WANTED = (
    "metric",
    "scale",
    "max_tokens",
    "reasoning_tags",
    "limit",
    "second_rule",
)  # keys of a row that decide its score


@dataclass(frozen=True, slots=True, kw_only=True)
class LmmsJob(Job[LmmsBenchmark]):
    """A call of lmms-eval, yet to be made."""

    prepared: Task


class Lmms:
    """Runner of the rows that lmms-eval asks and judges."""

    def warm_up(self) -> None:
        """Begin the import of lmms-eval, in a process of its own."""
        calls.warm_up()

    def prepare(self, asked: Asked[LmmsBenchmark]) -> LmmsJob:
        """Return a job; writes the task for lmms-eval into its folder.

        Raises:
            UserError: lmms-eval is not installed.
            ConfigError: the task is missing, a model would judge, or lmms-eval would misread the model name.
            DataError: the data of the task is missing.
        """
        versions = _versions()
        _check_name(asked.endpoint.model)
        row = asked.row
        if JUDGED.search(row.metric):
            raise ConfigError(
                f"{row.column}: another model gives the metric {row.metric!r}: lmms-eval would ask it at OpenAI, with "
                "the key of the measured model, and count what fails as a wrong answer; choose a metric that rules give"
            )
        task = prepare(row, asked.folder / "task", asked.suite.prompt_variant or asked.served.variant)
        return LmmsJob(
            asked=asked,
            task=row.task if not Path(row.task).is_absolute() else Path(row.task).name,
            metric=row.metric,
            code=(task.name, task.code),
            data=task.data,
            settings={
                **{key: getattr(row, key) for key in WANTED},
                **asdict(asked.served),
                "prompt_variant": task.variant,
            },
            versions=versions,
            prepared=task,
        )

    def measure(self, jobs: Sequence[LmmsJob]) -> Iterator[Done[LmmsJob]]:
        """Make the calls, some of them side by side."""
        with (
            ThreadPoolExecutor(SIDE_BY_SIDE) as pool,
            Calls() as running,
        ):  # exited in reverse order: first the calls end, then the threads
            futures = [pool.submit(_measure, job, running) for job in jobs]
            try:
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _measure(job: LmmsJob, running: Calls) -> Done[LmmsJob]:
    begin = time.monotonic()
    found: Measured | str
    try:
        found = _call(job, running)
    except InvalidRunError as why:
        found = str(why)
    return Done(job, found, time.monotonic() - begin)


def _call(job: LmmsJob, running: Calls) -> Measured:
    asked = job.asked
    output = asked.folder / "output"
    log = asked.folder / "log.txt"
    output.mkdir(parents=True)
    seconds = asked.suite.timeout
    local = asked.row.data is not None
    then = partial(second_rule.judge, output, job.prepared.name, asked.row.metric) if asked.row.second_rule else None
    status = running.run(
        arguments(job, output), log, environment(asked.endpoint), offline=local, timeout=seconds, then=then
    )
    if status is None:
        raise InvalidRunError(f"not finished after {seconds} s (`timeout` of the suite); log: {log}")
    if status != 0:
        raise InvalidRunError(f"lmms-eval ended with status {status}: {last_words(log)}; log: {log}")
    return validate(output, job.prepared.name, asked.row, job.prepared.rows)


def arguments(job: LmmsJob, output: Path) -> list[str]:
    """Return the command line of lmms-eval."""
    row = job.asked.row
    model = job.asked.endpoint.model
    options = {
        "--model": "openai",
        "--model_args": f"model={model},num_concurrent={job.asked.suite.concurrency},max_retries=3",
        "--tasks": job.prepared.name,
        "--output_path": str(output),
        # math-verify's time limit is a signal, which raises in threads: every answer would count as wrong
        "--process_docs_parallel": "1",
        "--verbosity": "DEBUG",  # with any other level, an exception ends with status 0
    }
    if row.reasoning_tags == "none":  # the default strips <think>...</think>, before the format is judged
        options["--reasoning_tags"] = "none"
    if job.prepared.folder is not None:
        options["--include_path"] = str(job.prepared.folder)
    if row.max_tokens is not None:
        options["--gen_kwargs"] = f"max_new_tokens={row.max_tokens}"
    if row.limit is not None:
        options["--limit"] = str(row.limit)
    return ["--log_samples", *(word for option in options.items() for word in option)]


def environment(endpoint: Endpoint) -> dict[str, str]:
    """Return the variables that name the model; on the command line everybody could see the key."""
    url = endpoint.url.rstrip("/")
    return {
        "OPENAI_API_KEY": endpoint.api_key or "none",
        "OPENAI_API_BASE": url if url.endswith("/v1") else f"{url}/v1",
        "LMMS_IMAGE_ENCODE_FORMAT": "PNG",  # images reach the server with their own size and pixels
        **http.environment(url, endpoint.proxy),
    }


@cache
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
