"""SFT: the teachers' own right answers instead of the student's rollouts."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mmopd.algorithm.base import Objective
from mmopd.settings_file import Positive

if TYPE_CHECKING:
    from torch import Tensor

    from mmopd.algorithm.settings import Algorithm
    from mmopd.algorithm.step import Step, Targets, Tokens


class SFT(Objective):
    """Likelihood of the teachers' own right answers.

    They are sampled once, before training, and stored next to the shards.
    """

    unused: ClassVar[tuple[str, ...]] = ("balance", "margin", "visual")

    kind: Literal["sft"] = Field(description="`sft`: likelihood of the teachers' own right answers")
    attempts: Positive = Field(
        8,
        description="Answers of the teachers to each prompt; the right ones are kept. 8 finds a right answer to most "
        "prompts that a teacher can answer; the cost grows in proportion",
    )

    def teacher_answers(self) -> int:
        """Return `attempts`."""
        return self.attempts

    def targets(self, step: "Step") -> "Targets":
        """Return equal weights for the tokens of a response."""
        from mmopd.algorithm.likelihood import sft

        return sft(step.response, weight=step.weight)

    def loss(self, tokens: "Tokens", settings: "Algorithm") -> "Tensor":
        """Return the negative log-likelihood."""
        from mmopd.algorithm.likelihood import likelihood_loss

        return likelihood_loss(tokens.logprob, tokens.weight)
