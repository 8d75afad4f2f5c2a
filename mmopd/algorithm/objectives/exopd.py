"""ExOPD: OPD with a reference, which lets the student go past its teacher."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from mmopd.algorithm.base import Objective

if TYPE_CHECKING:
    from mmopd.algorithm.step import Step, Targets


class ExOPD(Objective):
    """OPD that goes past the teacher: `r = scale (log pi_T - log pi_ref) - (log pi - log pi_ref)`; scale 1 is OPD."""

    unused: ClassVar[tuple[str, ...]] = ()

    kind: Literal["exopd"] = Field(description="`exopd`: OPD with a reference, which goes past the teacher")
    scale: float = Field(
        1.25,
        ge=1,
        description="Scale of the reward, lambda: 1 is OPD, more goes past the teacher. 1.25 as in ExOPD's own runs",
    )
    reference: str | Mapping[str, str] = Field(
        description="Teacher of the fleet that serves as the reference: the student before training, or the base of "
        "each teacher, as in `{math: math_base}`"
    )

    def references(self) -> str | Mapping[str, str]:
        """Return `reference`."""
        return self.reference

    def targets(self, step: "Step") -> "Targets":
        """Return the calibrated reward of each token, which goes past the teacher by `scale`."""
        from mmopd.algorithm.reverse_kl import targets_of

        return targets_of(step, scale=self.scale)
