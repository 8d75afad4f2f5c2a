"""Models of data/*.yaml: sources of prompts and their weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from mmopd.settings_file import Config, File, Positive


class Source(Config):
    """One folder of shards, all of one task."""

    shards: str | Path = Field(
        description="Folder of .tar shards with their .index.safetensors, or its URL (s3://..., https://...)"
    )
    task: str = Field(description="Task of all its rows: a name of modalities/")
    weight: float = Field(
        1.0,
        ge=0,
        description="Share of this source among the prompts, in proportion to the other weights. 1 weighs sources "
        "alike; 0 leaves it out",
    )
    schedule: Mapping[Annotated[int, Field(ge=1)], Annotated[float, Field(ge=0)]] = Field(
        {},
        description="Weights by step, linear in between: `{100: 0.5, 200: 2}`; `weight` is that of step 0. Empty: the"
        " weight stays",
    )
    max_prompt_tokens: Positive | None = Field(
        None,
        description="Rows with more prompt tokens, image tokens included, are left out and counted. `null` keeps all;"
        " the paper has 2,048",
    )

    def weight_at(self, step: int) -> float:
        """The weight at a step of the run."""
        points = sorted({0: self.weight, **self.schedule}.items())
        before, low = [point for point in points if point[0] <= step][-1]
        after, high = next((point for point in points if point[0] > step), (before + 1, low))
        return low + (high - low) * (step - before) / (after - before)


class Mixture(File):
    """`data/*.yaml`: weighted sources."""

    what: ClassVar[str] = "a mixture"
    use: ClassVar[str] = "`mixture` of a recipe names it, and `mmopd show {path}` prints what is in it"

    sources: Mapping[str, Source] = Field(description="Sources of prompts by name")
    adapt: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Preference for sources with both right and wrong answers of the student. 0 keeps the weights as "
        "they are, as in the paper; near 1, sources that are all right or all wrong are hardly drawn",
    )
    cache_gib: float = Field(
        50.0,
        gt=0,
        description="Disk space for local copies of remote shards, in GiB; the least recently used go first. It has "
        "to hold the shards in use at one time",
    )

    @model_validator(mode="after")
    def _some_weight(self) -> Self:
        for step in sorted({0}.union(*(source.schedule for source in self.sources.values()))):
            if sum(source.weight_at(step) for source in self.sources.values()) <= 0:
                raise ValueError("sources: the weights sum to zero" + (f" at step {step}" if step else ""))
        return self
