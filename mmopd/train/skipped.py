"""Skip updates whose loss or gradient is not finite, up to a limit, and keep their batches for `mmopd replay`.

The limits are constants, not settings: a run that skips more than a few updates does not need a higher limit, somebody
has to look at what was kept.
"""

import logging
import shutil
from collections import deque
from collections.abc import Sequence

from safetensors import SafetensorError

from mmopd.errors import UserError
from mmopd.runtime.run_folder import RunFolder
from mmopd.train.export import export
from mmopd.train.prefix_tree import Item
from mmopd.train.skipped_batch import write_batch
from mmopd.train.trainer import NotFiniteError, Trainer

logger = logging.getLogger(__name__)

ALLOWED = 3  # updates that may be skipped ...
WINDOW = 20  # ... among this many in sequence
KEPT = ALLOWED + 1  # batches in RUN/replay, each with the student's weights; the oldest go


class SkippingUpdater:
    """Makes the updates of a run, and skips those that cannot be made. All methods are collective."""

    def __init__(self, run: RunFolder, trainer: Trainer) -> None:
        self._run = run
        self._trainer = trainer
        self._skipped: deque[bool] = deque(maxlen=WINDOW)  # for each of the last updates

    def state(self) -> list[bool]:
        """Return the state for a resumed run."""
        return list(self._skipped)

    def restore(self, state: Sequence[bool]) -> None:
        """Go on from `state`."""
        self._skipped.extend(state)

    def update(self, step: int, batches: Sequence[Sequence[Item]]) -> list[dict[str, float]]:
        """Make one optimiser step on each batch; return what the trainer returned for those that were made.

        Raises:
            UserError: more than ALLOWED of the last WINDOW updates were skipped.
        """
        made: list[dict[str, float]] = []
        kept = False
        for items in batches:
            try:
                made.append(self._trainer.update(items))
                self._skipped.append(False)
            except NotFiniteError as error:
                self._skipped.append(True)
                if not kept:  # other batches of the step have the same weights, and probably the same fault
                    self._keep(step, items, error)
                kept = True
                self._check(step, error)
        return made

    def _check(self, step: int, error: NotFiniteError) -> None:
        if (n := sum(self._skipped)) > ALLOWED:
            raise UserError(
                f"step {step}: {error}; {n} of the last {len(self._skipped)} updates were skipped for this reason. "
                f"`mmopd replay {self._run.root} {step}` shows which responses cause it; a lower train.lr or "
                "algorithm.log_ratio_clip may help"
            )

    def _keep(self, step: int, items: Sequence[Item], error: NotFiniteError) -> None:
        """Write the batch and the weights that failed to RUN/replay; without room for them, training goes on."""
        folder = self._run.replay_of(step)
        fault = ""
        try:
            if self._trainer.ranks.rank == 0:
                for old in [folder, *sorted(set(self._run.replay.glob("step-*")) - {folder})[: 1 - KEPT]]:
                    shutil.rmtree(old, ignore_errors=True)
                folder.mkdir(parents=True)
                write_batch(folder, items, step=step, reason=str(error))
        except (OSError, SafetensorError) as lost:
            fault = f"{folder}: {lost}"
        try:
            self._trainer.ranks.agree(fault)
            export(self._trainer, folder / "model")
        except UserError as lost:
            logger.warning("step %d was skipped (%s), and is not kept for `mmopd replay`: %s", step, error, lost)
            if self._trainer.ranks.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
