"""The interface of a runner, which asks a served model the questions of rows of a suite and has the answers judged."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from mmopd.config import Suite
from mmopd.config.suite import Benchmark
from mmopd.evaluate.score import Measured
from mmopd.evaluate.served import Served
from mmopd.serving.endpoint import Endpoint

R = TypeVar("R", bound=Benchmark)
J = TypeVar("J", bound="Job[Any]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Generic[R]):
    """A row of a suite that a served model is to be asked."""

    row: R
    suite: Suite
    endpoint: Endpoint
    served: Served
    model: Path | None  # the model's folder; None if it is served elsewhere
    weights: str  # hash of the model's files; empty if they are not known
    folder: Path  # for the files of this measurement; does not exist yet
    cache: Path | None  # folder that later measurements share
    objection: Callable[[], str]  # returns why the weights that are served are not the ones meant, or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job(Generic[R]):
    """A row that is ready to be measured. Weights, `code`, `data`, `settings` and `versions` decide its result.

    A runner derives its own class, with what it needs to measure.
    """

    asked: Asked[R]
    task: str  # its name in the results
    metric: str
    code: Sequence[str]  # what else decides the result: hashes of files, of prompts and the like
    data: str  # hash of the local data; empty for published data
    settings: Mapping[str, Any]  # how the model is asked, as JSON types
    versions: Mapping[str, str]  # of packages that can change a score


class Done(NamedTuple, Generic[J]):
    """The end of a job."""

    job: J
    found: Measured | str  # the reason, if there is no score
    seconds: float


class Runner(Protocol[R, J]):
    """Measures the rows of one kind. It is stateless; an error that a user can fix is raised before anything is asked.

    A measurement that does not count is not an error: its reason is the result.
    """

    def warm_up(self) -> None:
        """Begin in the background what takes long and needs no model, if there is such."""

    def prepare(self, asked: Asked[R]) -> J:
        """Return a job, after all checks that need no server.

        Raises:
            UserError: a package is not installed.
            ConfigError: the row names something that does not exist, or does not suit the model.
            DataError: its data is missing or damaged.
        """

    def measure(self, jobs: Sequence[J]) -> Iterator[Done[J]]:
        """Measure jobs of one model, and yield each at its end, in any order.

        If the iterator is closed early, all that still runs is ended.
        """
