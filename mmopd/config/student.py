"""Settings of the student: the model that is trained, the engines that sample from it, and how it is sampled."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from mmopd.config.engine import Engine
from mmopd.settings_file import Config, Count, Positive

Sync = Literal["file", "broadcast", "ipc"]


class Student(Config):
    """The model that is trained, and the engine that samples from it."""

    model: Path = Field(
        description="Folder of a Qwen or Qwen-VL model in Hugging Face format: the student before training"
    )
    engine: Engine = Engine()
    replicas: Count = Field(
        1,
        description="Engines that sample, on GPUs of their own; each samples its share of the groups. More where "
        "sampling takes longer than training",
    )
    sync: Sync = Field(
        "file",
        description="Transport of new weights to the engine: `file` through shared memory of one machine, which works "
        "everywhere; on GPUs also `broadcast` (NCCL), or `ipc`, with which the engine shares the GPU of rank 0 and "
        "sleeps while the trainer learns",
    )

    @model_validator(mode="after")
    def _one_gpu(self) -> Self:
        if self.sync == "ipc" and self.engine.tensor_parallel > 1:
            raise ValueError("sync: ipc is for an engine on one GPU; set engine.tensor_parallel: 1, or sync: broadcast")
        if self.sync == "ipc" and self.replicas > 1:
            raise ValueError(
                "sync: ipc is for one engine, which shares the GPU of rank 0; set replicas: 1, or sync: broadcast"
            )
        return self


class Rollout(Config):
    """Sampling of the student: P prompts a step, G responses each (defaults of the paper's Table B.1)."""

    prompts: Positive = Field(
        64,
        description="Prompts of a step, P. The paper's Table B.1 has 64, so that a step has 64 x 16 = 1,024 responses",
    )
    group: Positive = Field(
        16,
        description="Responses to each prompt, G. 16 as in the paper, where it was better than 4 and 8, and 32 was no"
        " better",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="Sampling temperature of the student. 1 as in the paper: the responses are then samples of the "
        "policy whose gradient is taken",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the probability that sampling keeps (nucleus). 1 keeps all, for the same reason as "
        "temperature 1",
    )
    top_k: int = Field(
        0, ge=0, description="Likeliest tokens that sampling keeps; 0 keeps all, for the same reason as temperature 1"
    )
    max_tokens: Positive = Field(
        16384,
        description="Longest response in tokens; a longer one is cut. 16,384 as in the paper; lower it for tasks with"
        " short answers",
    )
    concurrency: Positive = Field(
        64,
        description="Prompts that one rank has in flight at once. 64 is a whole step; lower it where requests time "
        "out in the engine's queue",
    )
    async_steps: Literal[0, 1] = Field(
        0,
        description="Steps that the rollout runs ahead. 0 trains on the newest policy, as the paper does; 1 samples "
        "the next step while the trainer learns from this one, with weights that are one update older, "
        "and corrects for it by recomputed log-probs",
    )
