"""Settings of the evaluation between steps."""

from pathlib import Path

from pydantic import Field

from mmopd.settings_file import Config, Positive


class Evaluation(Config):
    """Held-out rows that the student answers between steps, judged by the verifiers of their tasks.

    It changes nothing in training: its draws are its own, and the rows are those of another mixture.
    """

    mixture: Path = Field(
        description="File of data/ with the held-out rows; its weights are not used. Sources that the student trains "
        "on are refused"
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
