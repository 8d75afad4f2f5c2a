"""Models of eval/*.yaml: benchmarks."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from mmopd.settings_file import Config, File, Positive

PromptVariant = Literal["default", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]


class Benchmark(Config):
    """One row of a suite, one column of the results table."""

    column: str = Field(description="Name of its column in the results table")
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
    limit: Positive | None = Field(
        None,
        description="Questions that are asked, from the first on. `null` asks all; a small number is for a quick check",
    )


class Suite(File):
    """`eval/*.yaml`: benchmarks."""

    what: ClassVar[str] = "a suite of benchmarks"
    use: ClassVar[str] = "`suite` of a recipe names it, and `mmopd eval {path} MODEL` runs it"

    benchmarks: tuple[Benchmark, ...] = Field(description="Benchmarks, in the order of the table's columns")
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
