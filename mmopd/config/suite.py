"""Models of eval/*.yaml: benchmarks. A row is one of several models, chosen by its key `runner`."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from mmopd.errors import ConfigError
from mmopd.settings_errors import described
from mmopd.settings_file import Config, File, Positive
from mmopd.workspace import is_file

PromptVariant = Literal["default", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]


class Benchmark(Config):
    """One row of a suite, one column of the results table; the derived classes are the rows of each runner."""

    runner: str
    column: str = Field(description="Name of its column in the results table")
    limit: Positive | None = Field(
        None,
        description="Questions that are asked, from the first on. `null` asks all; a small number is for a quick check",
    )

    def resolved(self, folder: Path, workspace: Path) -> Self:
        """Return the row with absolute paths.

        Args:
            folder: that of the suite's file.
            workspace: folder from which data is found.

        Raises:
            ConfigError: a file of the row is missing.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say where its files are")


class LmmsBenchmark(Benchmark):
    """A task that lmms-eval asks and judges."""

    runner: Literal["lmms"] = Field(
        "lmms", description="What asks and judges. This one is meant where the key is left out"
    )
    task: str = Field(description="Task of lmms-eval: the name of a built-in one, or a .yaml file of eval/")
    metric: str = Field(description="Key in lmms-eval's results, such as `exact_match,none`")
    scale: float = Field(
        1.0,
        gt=0,
        description="Largest value of the metric; results are shown from 0 to 100. 1 for a share, 100 for percent",
    )
    data: Path | None = Field(
        None,
        description="Local parquet file in the place of the task's own data. `null`: lmms-eval loads the task's own",
    )
    max_tokens: Positive | None = Field(
        None, description="Longest response in tokens. `null`: what the task says; the paper has 16,384"
    )
    reasoning_tags: Literal["none", "default"] = Field(
        "none",
        description="Text between tags of reasoning: `none` leaves responses as they are, so that their format can be"
        " judged; `default` lets lmms-eval remove <think>...</think>",
    )
    second_rule: Literal["openmmreasoner"] | None = Field(
        None,
        description="A second judgement of the same responses, shown beside the score. `openmmreasoner` compares "
        "letters only where the key is one letter; for tasks that lmms-eval judges by its `acc_score`",
    )

    def resolved(self, folder: Path, workspace: Path) -> Self:
        """Return the row with absolute paths: a task file is found from the suite's folder, data from the workspace."""
        update: dict[str, Any] = {}
        if self.task.endswith((".yaml", ".yml")):
            update["task"] = str(folder.absolute() / self.task)
            if not is_file(Path(update["task"])):
                raise ConfigError(f"{self.column}: no task file {described(self.task)} in {folder}")
        if self.data is not None:
            update["data"] = workspace.absolute() / self.data
        return self.model_copy(update=update)


class SampledBenchmark(Benchmark):
    """A benchmark of text that mmopd samples itself: n responses to each problem, pass@1 and pass@k.

    The paper's settings are the defaults, except `n`, which the paper does not give.
    """

    runner: Literal["sampled"] = Field(description="What asks and judges")
    benchmark: str = Field(description="Which one: prompt, judge and data of its project go by this name")
    data: Path | None = Field(
        None,
        description="Local .jsonl or .parquet file with the rows, in the columns of the published data. `null`: the "
        "published data, by name from the model hub",
    )
    n: Positive = Field(description="Responses to each problem; pass@1 is their mean")
    k: tuple[Positive, ...] = Field(
        (), description="For each of these, pass@k is shown beside pass@1: an estimate from all n responses (Eq. 15)"
    )
    temperature: float = Field(1.0, ge=0, description="Sampling temperature. 1 as in the paper; 0 takes the likeliest")
    top_p: float = Field(1.0, gt=0, le=1, description="Share of the probability that sampling keeps. 1 as in the paper")
    max_tokens: Positive = Field(
        16384, description="Longest response in tokens; a longer one is cut, and counted. 16,384 as in the paper"
    )
    seed: int = Field(
        42, ge=0, description="Seed from which each request gets its own, by problem and response. 42 as in the paper"
    )

    @model_validator(mode="after")
    def _has_enough(self) -> Self:
        if self.k and max(self.k) > self.n:
            raise ValueError(f"k: pass@{max(self.k)} needs at least as many responses, and n is {self.n}")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n: {self.n} responses at temperature 0 are all the same; set n: 1")
        return self

    def resolved(self, folder: Path, workspace: Path) -> Self:
        """Return the row with the path of its data from the workspace."""
        return self if self.data is None else self.model_copy(update={"data": workspace.absolute() / self.data})


def _with_runner(row: Any) -> Any:
    return {"runner": "lmms", **row} if isinstance(row, dict) else row


AnyBenchmark = Annotated[
    Annotated[LmmsBenchmark | SampledBenchmark, Field(discriminator="runner")], BeforeValidator(_with_runner)
]


class Suite(File):
    """`eval/*.yaml`: benchmarks."""

    what: ClassVar[str] = "a suite of benchmarks"
    use: ClassVar[str] = "`suite` of a recipe names it, and `mmopd eval {path} MODEL` runs it"

    benchmarks: tuple[AnyBenchmark, ...] = Field(description="Benchmarks, in the order of the table's columns")
    concurrency: Positive = Field(16, description="Questions in flight at once to each model")
    timeout: Positive = Field(
        1800,
        description="Seconds for one benchmark; one that takes longer has no score. 1,800 suits a few hundred short "
        "answers",
    )
    prompt_variant: PromptVariant | None = Field(
        None,
        description="Whose prompts the tasks use: their part of this name in `lmms_eval_specific_kwargs`, or `default` "
        "where they have none. `null` takes the family of each model, and `default` for a model that is served "
        "elsewhere. Set it for such a model, or to measure all models with the same prompts",
    )
