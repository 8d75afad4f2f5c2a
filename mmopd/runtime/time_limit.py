"""Time limit of a run (`train.minutes`): stop while there is still time for a checkpoint.

The launcher writes the time of the end into the run folder when it starts. Ranks read it there: a launcher of ranks on
other machines passes on neither arguments nor environment that it does not know.
"""

import math
import time
from collections import deque

from mmopd.runtime.run_folder import RunFolder

RECENT = 20  # steps whose longest predicts the next


def start_limit(run: RunFolder, minutes: float | None) -> None:
    """Start the time of a run; `None` is no limit."""
    run.until.unlink(missing_ok=True)
    if minutes is not None:
        run.until.write_text(str(time.time() + 60 * minutes), encoding="utf-8")


class TimeLimit:
    """The end of a run's time, and how long its steps and checkpoints take.

    Args:
        until: seconds since the epoch.
    """

    def __init__(self, until: float = math.inf) -> None:
        self._until = until
        self._steps: deque[float] = deque(maxlen=RECENT)
        self._saved = 0.0

    @classmethod
    def of(cls, run: RunFolder) -> "TimeLimit":
        """Return the limit that `start_limit` has written."""
        return cls(float(run.until.read_text(encoding="utf-8"))) if run.until.exists() else cls()

    def is_over(self, seconds: float, saved: float) -> bool:
        """Return true if another step and a checkpoint after it might not end in time.

        Until a checkpoint is measured, it is assumed to take as long as the longest step.

        Args:
            seconds: of the step that has just ended.
            saved: seconds of the checkpoint before that step; 0 if there was none.
        """
        self._steps.append(seconds)
        self._saved = max(self._saved, saved)
        longest = max(self._steps)
        return time.time() + longest + (self._saved or longest) > self._until
