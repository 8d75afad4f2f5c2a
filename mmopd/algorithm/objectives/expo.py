"""ExPO: the teachers' weights are merged; nothing is trained."""

from typing import ClassVar, Literal

from pydantic import Field

from mmopd.algorithm.base import Objective


class ExPO(Objective):
    """No training: the weights of the teachers, merged and extrapolated from the student's (`mmopd merge`)."""

    unused: ClassVar[tuple[str, ...]] = ("difficulty", "balance", "margin", "visual")

    kind: Literal["expo"]
    alpha: float = Field(1.25, gt=0, description="1 is the mean of the teachers, more goes past it")

    def extrapolation(self) -> float:
        """Return `alpha`."""
        return self.alpha
