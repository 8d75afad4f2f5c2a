"""Estimate of the time that a run still needs, from what its stages took in an earlier run."""

import json
from collections.abc import Mapping

from mmopd.config import Recipe
from mmopd.errors import UserError
from mmopd.runtime.run_folder import RunFolder

LOOKED_AT = 10  # runs, newest first
CACHED = 0.2  # a stage that took less than this share of its usual time found its results in a cache


class TimeLeft:
    """The time that is left of a run with known stages.

    Args:
        usual: seconds of each stage, in order, by title; stages that are not named are not counted.
    """

    def __init__(self, usual: Mapping[str, float]) -> None:
        self._usual = dict(usual)
        self._took: dict[str, float] = {}

    def finished(self, title: str, seconds: float) -> None:
        """Record what a stage took on this machine."""
        self._took[title] = seconds

    def of_stage(self, title: str, elapsed: float) -> float | None:
        """Return the seconds that a running stage still needs by its usual time; None if that is not known."""
        return max(0.0, self._usual[title] * self._pace() - elapsed) if title in self._usual else None

    def after(self, title: str) -> float | None:
        """Return the seconds that the stages after this one need; None if nothing is known of them."""
        if title not in self._usual:
            return None
        titles = list(self._usual)
        return self._pace() * sum(
            self._usual[later] for later in titles[titles.index(title) + 1 :] if later not in self._took
        )

    def _pace(self) -> float:
        """Return the time that this machine takes for a stage, divided by the usual time."""
        measured = {
            title: took
            for title, took in self._took.items()
            if title in self._usual and took >= CACHED * self._usual[title]
        }
        usual = sum(self._usual[title] for title in measured)
        return sum(measured.values()) / usual if usual else 1.0


def usual_seconds(run: RunFolder, recipe: Recipe, otherwise: Mapping[str, float]) -> Mapping[str, float]:
    """Return the seconds of each stage of the newest finished run next to this one that differs in its seed alone.

    Args:
        run: the run that begins.
        recipe: its settings.
        otherwise: what is returned without such a run.
    """
    others = sorted(run.root.parent.glob("*/report.html"), key=lambda path: path.stat().st_mtime, reverse=True)
    for report in others[:LOOKED_AT]:
        other = RunFolder(report.parent)
        try:
            seconds = {str(title): float(took) for title, took in json.loads(other.timings.read_bytes()).items()}
            if other.recipe().model_copy(update={"seed": recipe.seed}) == recipe:
                return seconds
        except (OSError, ValueError, TypeError, AttributeError, UserError):  # a damaged run tells nothing
            continue
    return otherwise
