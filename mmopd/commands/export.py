"""`mmopd export RUN`: the student of a checkpoint as a HF folder. Ranks load it as a resumed run does, and write it as
its end does.
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
    """Write the student as it was after `step` steps; the folder.

    Args:
        step: of a checkpoint that is there; the newest if not given.
        out: must not exist; RUN/export-STEP if not given.
        ranks: processes on this machine, each with a GPU where there are any; as many as have trained if not given.

    Raises:
        UserError: no such checkpoint, or a file of it is not as it was saved; or the folder exists.
    """
    recipe = run.recipe()
    there = {step_of(path.name): path for path in Checkpoints(run.checkpoints, 1).whole()}
    chosen = there.get(max(there, default=0) if step is None else step)
    if chosen is None:
        which = f"of step {step}" if step is not None else "yet"
        raise CheckpointError(
            f"{run.checkpoints}: no checkpoint {which}; there is {', '.join(map(str, sorted(there))) or 'none'}"
        )
    out = out or run.root / f"export-{step_of(chosen.name)}"
    if out.exists():
        raise UserError(f"{out}: it exists; name another folder with --out")
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
