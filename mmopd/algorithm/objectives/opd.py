"""OPD and Uni-OPD: the default objective."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mmopd.algorithm.base import Objective

if TYPE_CHECKING:
    from mmopd.algorithm.step import Step, Targets


class OPD(Objective):
    """Reverse KL on the student's own tokens (paper 3.2).

    With the three parts of `Algorithm` it is Uni-OPD, without them OPD.
    """

    unused: ClassVar[tuple[str, ...]] = ()

    kind: Literal["opd"] = Field(
        "opd",
        description="`opd`: reverse KL to the teacher on the student's own tokens, with a token's log-ratio as its "
        "reward (paper 3.2)",
    )

    def targets(self, step: "Step") -> "Targets":
        """Return the calibrated reward of each token."""
        from mmopd.algorithm.reverse_kl import targets_of

        return targets_of(step)
