"""Definition of an objective: its settings, what it needs from a run, and how a step becomes a loss.

An objective is one class derived from `Objective`, in its own file: mmopd's are in `mmopd/algorithm/objectives/`, a
workspace's in `algorithm/NAME.py`. No other part of mmopd knows an objective by name; each asks for its needs, and
`mmopd plan` and the metrics follow from the answers. This module loads no torch, so that a recipe is read quickly:
`targets` and `loss` import tensor functions when they are called.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from mmopd.settings_file import Config

if TYPE_CHECKING:
    from torch import Tensor

    from mmopd.algorithm.settings import Algorithm
    from mmopd.algorithm.step import Step, Targets, Tokens


class Objective(Config):
    """An objective: defines what a student learns from a step. The fields of a derived class are its settings.

    Attributes:
        needs_teachers: the recipe needs a fleet, and responses without a teacher's score are left out.
        unused: parts of `Algorithm` that the objective ignores: they are off, and a recipe that sets one is an error.
            An objective that does not call `balance_online` and the margins itself leaves this unchanged.
    """

    needs_teachers: ClassVar[bool] = True
    unused: ClassVar[tuple[str, ...]] = ("balance", "margin")

    kind: str

    def likeliest(self) -> int:
        """Return how many of the teacher's likeliest tokens a score must list at each position."""
        return 0

    def references(self) -> str | Mapping[str, str] | None:
        """Return the reference, as a teacher's name for all teachers or by teacher; None without a reference."""
        return None

    def teacher_answers(self) -> int:
        """Return how many answers to each prompt teachers give before training, in place of the student's rollouts."""
        return 0

    def extrapolation(self) -> float | None:
        """Return alpha of `mmopd merge` if merged weights replace training; else None."""
        return None

    @property
    def trains(self) -> bool:
        """True if the student is trained."""
        return self.extrapolation() is None

    @property
    def samples_rollouts(self) -> bool:
        """True if the student learns from its own responses; else their accuracy, entropy and age do not exist."""
        return self.trains and not self.teacher_answers()

    def targets(self, step: "Step") -> "Targets":
        """Return an advantage and a weight for each token of a step.

        All ranks call it with the same responses of all ranks, and must get the same values.
        """
        raise NotImplementedError(f"{type(self).__name__} has no targets")

    def loss(self, tokens: "Tokens", settings: "Algorithm") -> "Tensor":
        """Return the loss of a micro-batch, a sum over its tokens, differentiable in `tokens.logprob`.

        `tokens.weight` holds every mean, so that the losses of micro-batches and ranks add up. The default is the
        clipped policy loss of PPO.
        """
        from mmopd.algorithm.clipped import clipped_loss

        low = settings.clip_low
        high = settings.clip_high
        return clipped_loss(tokens.logprob, tokens.old, tokens.advantage, tokens.weight, clip_low=low, clip_high=high)
