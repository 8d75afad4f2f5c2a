"""ExPO: the teachers' weights are merged; nothing is trained."""

from typing import ClassVar, Literal

from pydantic import Field

from mmopd.algorithm.base import Objective


class ExPO(Objective):
    """No training: the weights of the teachers are merged, and extrapolated from the student's (`mmopd merge`)."""

    unused: ClassVar[tuple[str, ...]] = ("difficulty", "balance", "margin", "visual")

    kind: Literal["expo"] = Field(
        description="`expo`: no training; the teachers' weights are merged and extrapolated from the student's"
    )
    alpha: float = Field(
        1.25,
        gt=0,
        description="Factor of the extrapolation: 1 is the mean of the teachers, more goes past it. 1.25 is our "
        "default; the paper only says that it is above 1",
    )

    def extrapolation(self) -> float:
        """Return `alpha`."""
        return self.alpha
