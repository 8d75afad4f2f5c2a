"""Settings of the evaluation between steps."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from mmopd.settings_file import Config, Positive


class Evaluation(Config):
    """Held-out rows, a suite of benchmarks, or both, which the student answers between steps.

    It changes nothing in training: its draws are its own, and the rows are those of another mixture.
    """

    mixture: Path | None = Field(
        None,
        description="File of data/ with held-out rows, which the verifiers of their tasks judge; its weights are not "
        "used. Sources that the student trains on are refused. `null`: no rows",
    )
    suite: Path | None = Field(
        None,
        description="File of eval/ with benchmarks, which are run by their own rules, as after the training; that "
        "takes minutes to hours each time. `null`: no benchmarks",
    )
    limit: Positive | None = Field(
        None, description="Questions of each benchmark of the suite, from the first on. `null`: what the suite says"
    )
    every: Positive = Field(
        10, description="Steps between two evaluations. The student is evaluated after the last step, too"
    )
    rows: Positive = Field(
        128,
        description="Rows of each source, evenly spaced, the same ones each time. With 128 the interval of 95 % is at "
        "most 9 percent points wide to each side",
    )
    attempts: Positive = Field(
        1,
        description="Responses to each row. Their seeds are the same each time: steps differ by their weights alone",
    )
    at_start: bool = Field(True, description="Evaluate the student before its first step, too")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature. 1 as in the paper's evaluation of text")
    top_p: float = Field(1.0, gt=0, le=1, description="Share of the probability that sampling keeps. 1 keeps all")
    top_k: int = Field(0, ge=0, description="Likeliest tokens that sampling keeps; 0 keeps all")
    max_tokens: Positive | None = Field(
        None, description="Longest response in tokens; a longer one is cut. `null`: `rollout.max_tokens`"
    )

    @model_validator(mode="after")
    def _has_questions(self) -> Self:
        if self.mixture is None and self.suite is None:
            raise ValueError("evaluate: name held-out rows (`mixture`), benchmarks (`suite`), or both")
        if self.limit is not None and self.suite is None:
            raise ValueError("evaluate.limit: it limits the benchmarks of `suite`; `rows` limits those of the mixture")
        return self
