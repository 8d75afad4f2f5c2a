"""Model of recipes/*.yaml: a whole run."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from mmopd.algorithm.settings import Algorithm
from mmopd.config.evaluation import Evaluation
from mmopd.config.student import Rollout, Student
from mmopd.config.train import Train
from mmopd.settings_file import File

LoggerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class Recipe(File):
    """`recipes/*.yaml`: a whole run."""

    what: ClassVar[str] = "a recipe"
    use: ClassVar[str] = "`mmopd train {path}` runs it, and `mmopd show {path}` prints it"

    prepare: Path | None = Field(
        None,
        description="File of data/ with a function `prepare(workspace, stage)` that makes what the recipe refers to. "
        "`null`: everything is there",
    )
    seed: int = Field(0, description="Seed of all draws: prompts, sampling, balance. A resumed run draws the same")
    student: Student
    fleet: Path | None = Field(
        None, description="File of teachers/. `null` only for an objective that needs no teacher"
    )
    mixture: Path = Field(description="File of data/ with the sources of prompts")
    suite: Path | None = Field(
        None, description="File of eval/ for the evaluation before and after. `null` evaluates nothing"
    )
    evaluate: Evaluation | None = Field(
        None, description="Evaluation between steps on held-out rows, by the verifiers of their tasks. `null`: none"
    )
    rollout: Rollout = Rollout()
    algorithm: Algorithm = Algorithm()
    train: Train = Train()
    loggers: tuple[LoggerName, ...] = Field(
        ("tensorboard",),
        description="Where metrics, settings, samples and results go besides the run folder. Each needs its package, "
        "`pip install 'mmopd[wandb]'` for example; `tensorboard` is always there. Empty: the run folder alone",
    )

    @model_validator(mode="after")
    def _has_teachers(self) -> Self:
        objective = self.algorithm.objective
        if self.fleet is None and objective.needs_teachers:
            raise ValueError(f"fleet: missing, and `{objective.kind}` learns from teachers; `grpo` needs none")
        return self

    @model_validator(mode="after")
    def _sync_has_its_trainer(self) -> Self:
        objective = self.algorithm.objective
        if self.student.sync != "file" and not objective.trains:
            raise ValueError(
                f"student.sync: `{objective.kind}` sends merged weights once, without a trainer; leave it out"
            )
        if self.student.sync == "ipc" and self.rollout.async_steps:
            raise ValueError(
                "student.sync: with ipc the engine sleeps while the trainer learns; rollout.async_steps needs it awake"
            )
        return self

    @model_validator(mode="after")
    def _evaluates_what_it_keeps(self) -> Self:
        objective = self.algorithm.objective
        if self.evaluate is None:
            return self
        if not objective.trains:
            raise ValueError(f"evaluate: `{objective.kind}` has no steps; leave it out")
        if self.evaluate.mixture and self.train.keep_best and self.train.checkpoint_every % self.evaluate.every:
            raise ValueError(
                f"train.keep_best goes by evaluate, and train.checkpoint_every = {self.train.checkpoint_every} is no "
                f"multiple of evaluate.every = {self.evaluate.every}: the kept checkpoints would have no score"
            )
        return self

    @model_validator(mode="after")
    def _may_run_ahead(self) -> Self:
        objective = self.algorithm.objective
        if self.recomputes and not objective.samples_rollouts:
            key = "rollout.async_steps" if self.rollout.async_steps else "train.old_logprobs"
            raise ValueError(f"{key}: `{objective.kind}` learns from no rollouts; leave it out")
        if self.rollout.async_steps and self.train.old_logprobs == "engine":
            raise ValueError(
                "train.old_logprobs: with rollout.async_steps the engine's log-probs are those of older weights; "
                "leave it out, or recompute"
            )
        return self

    @property
    def recomputes(self) -> bool:
        """True if the trainer computes the log-probs of the sampled tokens itself."""
        return self.train.old_logprobs == "recompute" or self.rollout.async_steps > 0

    @model_validator(mode="after")
    def _engine_takes_a_group(self) -> Self:
        limit = self.student.engine.max_num_seqs
        attempts = self.algorithm.difficulty.attempts if self.algorithm.difficulty else 0
        for key, n in (("rollout.group", self.rollout.group), ("algorithm.difficulty.attempts", attempts)):
            if n > limit:
                raise ValueError(
                    f"{key} is {n}, and student.engine.max_num_seqs is {limit}: "
                    "vLLM takes no request for more responses than that"
                )
        return self
