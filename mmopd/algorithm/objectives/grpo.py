"""GRPO: outcomes instead of teachers."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mmopd.algorithm.base import Objective

if TYPE_CHECKING:
    from mmopd.algorithm.step import Step, Targets


class GRPO(Objective):
    """Outcomes alone, no teacher (Table B.1): `(o - mean) / std` over a prompt's responses, on each of their tokens.

    It can train teachers.
    """

    needs_teachers: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = ("balance", "margin", "visual")

    kind: Literal["grpo"] = Field(description="`grpo`: outcomes alone, without a teacher (Table B.1)")

    def targets(self, step: "Step") -> "Targets":
        """Return the advantage of each response in its group."""
        from mmopd.algorithm.advantage import grpo

        return grpo(step.response, outcome=step.outcome, group=step.group, threshold=step.settings.outcome_threshold)
