"""Dense: a divergence over several tokens at each position."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from mmopd.algorithm.base import Objective
from mmopd.settings_file import Positive

if TYPE_CHECKING:
    from torch import Tensor

    from mmopd.algorithm.settings import Algorithm
    from mmopd.algorithm.step import Step, Targets, Tokens


class Dense(Objective):
    """A divergence over several tokens at each position, instead of the sampled token alone.

    The tokens are the teacher's likeliest, with all others as one.
    """

    unused: ClassVar[tuple[str, ...]] = ("margin",)

    kind: Literal["dense"] = Field(
        description="`dense`: a divergence over the teacher's likeliest tokens at each position"
    )
    divergence: Literal["forward_kl", "jsd"] = Field(
        "forward_kl",
        description="`forward_kl` makes the student cover all that the teacher does; `jsd` is between forward and "
        "reverse KL",
    )
    top_k: Positive = Field(
        20,
        description="Likeliest tokens of the teacher at each position; all others count as one. 20 is the most that "
        "vLLM gives by default; more need `--max-logprobs` in the teacher's engine.extra_args",
    )
    beta: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of the teacher in the mixture, for `jsd`. 0.5 treats teacher and student alike; no effect "
        "with `forward_kl`",
    )

    @field_validator("divergence", mode="before")
    @classmethod
    def _has_a_tail(cls, divergence: object) -> object:
        if divergence == "reverse_kl":
            raise ValueError(
                "reverse KL over the teacher's likeliest tokens is not offered: it needs the teacher's log-probs of "
                "the student's other tokens, which are not known. Use kind `opd`: reverse KL on the sampled tokens"
            )
        return divergence

    def likeliest(self) -> int:
        """Return `top_k`."""
        return self.top_k

    def targets(self, step: "Step") -> "Targets":
        """Return the weights of OPD; its advantages have no effect on the divergence."""
        from mmopd.algorithm.reverse_kl import targets_of

        return targets_of(step)

    def loss(self, tokens: "Tokens", settings: "Algorithm") -> "Tensor":
        """Return the weighted sum of the divergences."""
        from mmopd.algorithm.divergence import forward_kl, jsd

        if tokens.likeliest is None:  # a micro-batch without responses, whose one token has weight 0
            return super().loss(tokens, settings)
        teacher, student = tokens.likeliest
        each = forward_kl(teacher, student) if self.divergence == "forward_kl" else jsd(teacher, student, self.beta)
        return (tokens.weight * each).sum()
