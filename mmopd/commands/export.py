"""`mmopd export RUN`: write the student of a checkpoint as an HF folder.

Ranks load the checkpoint as in a resumed run, and write the folder as at the end of a run.
"""

import time
from pathlib import Path

from mmopd.errors import CheckpointError, UserError
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.runtime.rank_processes import Pulses, check_ranks, start_ranks
from mmopd.runtime.run_folder import RunFolder, step_of
from mmopd.train.checkpoint import Checkpoints


def export_checkpoint(
    run: RunFolder, step: int | None, out: Path | None, stages: Stages, ranks: int | None = None
) -> Path:
    """Write the student after `step` steps; return the folder.

    Args:
        run: the run folder.
        step: step of an existing checkpoint; default: the newest.
        out: folder to write; must not exist; default: RUN/export-STEP.
        stages: where the progress is shown.
        ranks: number of processes on this machine, each with a GPU if there are any; default: the number of ranks of
            the training.

    Raises:
        CheckpointError: there is no such checkpoint, or a file of it has changed since it was saved.
        UserError: the folder exists.
    """
    recipe = run.recipe()
    there = {step_of(path.name): path for path in Checkpoints(run.checkpoints, 1).whole()}
    chosen = there.get(max(there, default=0) if step is None else step)
    if chosen is None:
        which = f"of step {step}" if step is not None else "yet"
        raise CheckpointError(
            f"{run.checkpoints}: no checkpoint {which}; checkpoints: {', '.join(map(str, sorted(there))) or 'none'}"
        )
    out = out or run.root / f"export-{step_of(chosen.name)}"
    if out.exists():
        raise UserError(f"{out}: this folder exists already; choose another with --out")
    run.logs.mkdir(exist_ok=True)
    with stages.stage("export") as stage, Children() as children:
        what = ["mmopd.train.export_rank", str(run.root), str(chosen), str(out)]
        running = start_ranks(what, ranks or recipe.train.ranks, run.logs, children, name="export")
        pulses = Pulses(running, recipe.train.timeout)
        alive = True
        while alive:
            time.sleep(0.1)
            alive = any(rank.alive for rank in running)
            check_ranks(running, recipe.train.timeout, stopping=False)
            pulses.check()
        stage.outcome = f"{chosen.name} as {out}"
    return out
