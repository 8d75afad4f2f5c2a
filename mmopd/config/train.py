"""Settings of training: optimiser, micro-batches, what trains, checkpoints, and limits at which a run stops."""

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from mmopd.settings_file import Config, Count, Fraction, Positive

Part = Literal["vision", "projector", "language"]  # of a student


class Lora(Config):
    """LoRA: matrices of rank `rank`, scaled by `alpha / rank`, are added to linear layers; the model's weights stay
    frozen.
    """

    rank: Annotated[int, Field(ge=1, le=512)] = Field(
        16, description="Rank of the matrices. 16 is usual; a higher one can learn more and costs memory in proportion"
    )
    alpha: float = Field(
        32.0,
        gt=0,
        description="Scale: the matrices' product is multiplied by alpha / rank. 32 is twice the default rank, as "
        "usual; keep the proportion when rank changes",
    )
    parts: Annotated[tuple[Part, ...], Field(min_length=1)] = Field(
        ("language",),
        description="Parts of the student that get adapters: `vision` (the tower), `projector` (its merger), "
        "`language`. The language model alone by default",
    )
    targets: tuple[str, ...] = Field(
        (),
        description="Last names of the linear layers that get adapters, such as `q_proj`. Empty: all linear layers of"
        " the parts, without the output head and experts",
    )


class Train(Config):
    """The optimiser and the micro-batches (defaults of the paper's Table B.1)."""

    steps: Positive = Field(
        100,
        description="Steps of the run; each has one rollout and `minibatches` updates. Set it for the run: the "
        "default is only a start",
    )
    ranks: Count = Field(1, description="Training processes over all machines, one for each GPU. 1 is the smallest run")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="Type of the weights in training. `bfloat16` as usual on GPUs, with float32 copies in the "
        "optimiser; `float32` on CPU and for exact comparisons",
    )
    lr: float = Field(
        1e-6,
        gt=0,
        description="Learning rate of Adam. 1e-6 as in the paper; ExOPD's own runs have 1e-5, and LoRA usually needs "
        "about 10 times more than full weights",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="Course of the learning rate after the warm-up: `constant` as in the paper, or falling to 0 at "
        "the last step, `linear` or `cosine`",
    )
    warmup: int = Field(5, ge=0, description="Optimiser steps in which `lr` rises to its full value. 5 as in the paper")
    betas: tuple[float, float] = Field(
        (0.9, 0.98), description="Decay rates of Adam's two moments. 0.9 and 0.98 as in the paper"
    )
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay of Adam. 0.1 as in the paper")
    grad_clip: float = Field(
        1.0, gt=0, description="Largest norm of a gradient over all ranks; a larger one is scaled down. 1 as usual"
    )
    minibatches: Positive = Field(
        1,
        description="Updates for each rollout, each on whole groups, and a mean over its own responses. 1 stays on "
        "policy, as in the paper; more learn more from a rollout, and the clipping then matters",
    )
    old_logprobs: Literal["engine", "recompute"] | None = Field(
        None,
        description="The student's log-probs that updates start from: `engine` takes those of sampling, `recompute` "
        "lets the trainer compute them once more, which corrects for differences between the two. `null`:"
        " recompute with rollout.async_steps, else engine",
    )
    micro_tokens: Positive = Field(
        16384,
        description="Tokens in a packed micro-batch of one rank. 16,384 as in the paper; lower it when memory runs "
        "out. It changes no result, only memory and speed",
    )
    micro_patches: Positive = Field(
        16384,
        description="Vision patches in a packed micro-batch of one rank. A second limit, since patches cost memory in"
        " the vision tower; lower it when memory runs out",
    )
    gradient_checkpointing: bool = Field(
        True,
        description="True computes activations again in the backward pass: about a third more time, much less memory."
        " False where memory is plenty",
    )
    offload: bool = Field(
        False,
        description="True keeps optimiser state and weights in CPU memory: slower, for models that do not fit the "
        "GPUs. An error without a GPU",
    )
    freeze: tuple[Part, ...] = Field(
        (),
        description="Parts of the student that are not trained: `vision` (the tower), `projector` (its merger), "
        "`language`. None by default, as in the paper",
    )
    lora: Lora | None = Field(
        None,
        description="LoRA adapters to train instead of the model's own weights. `null` trains all weights, as the "
        "paper does",
    )
    checkpoint_every: Positive = Field(
        50,
        description="Steps between two checkpoints; the last step has one in any case. 50 loses at most 50 steps; a "
        "checkpoint holds weights and optimiser state",
    )
    minutes: float | None = Field(
        None,
        gt=0,
        description="Minutes in which one `mmopd train`, from its start, stops with a checkpoint, as if asked to, by "
        "the measured length of steps and checkpoints. Give some minutes less than a scheduler does; `null`: no limit",
    )
    keep_checkpoints: Positive = Field(
        2, description="Newest checkpoints that are kept. 2, so that one is left if the newest is damaged"
    )
    keep_best: int = Field(
        0,
        ge=0,
        description="Older checkpoints that are kept too: those after whose steps most responses were right, by "
        "`evaluate` if it is there, otherwise of the rollouts. 0 keeps none and saves disk space",
    )
    probe_tolerance: float = Field(
        0.1,
        gt=0,
        description="Largest difference of log-probs, in nats, between engine and trainer after a weight sync; above "
        "it the run stops. 0.1 suits bfloat16; 1e-4 suits float32",
    )
    max_absent: Fraction = Field(
        0.2,
        description="Share of a step's responses that may lack a score before the run stops. 0.2 survives a replica "
        "that restarts; a dead teacher exceeds it",
    )
    timeout: Positive = Field(
        7200,
        description="Seconds for an answer of the engine, its queue included; longer than a whole rollout. Ranks wait"
        " a tenth longer for each other. 7,200 suits responses of 16,384 tokens; lower it to notice a "
        "hang sooner",
    )

    @model_validator(mode="after")
    def _something_trains(self) -> Self:
        if set(self.freeze) == set(get_args(Part)):
            raise ValueError("freeze: vision, projector and language are all that a student has: nothing would train")
        if self.freeze and self.lora is not None:
            raise ValueError(
                "freeze: with `lora` all of the model's own weights are frozen already; "
                "say in lora.parts what gets adapters"
            )
        return self
