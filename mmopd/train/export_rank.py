"""One rank of `mmopd export`, started with the environment of a training rank.

Usage: `python -m mmopd.train.export_rank RUN CHECKPOINT OUT`.
"""

import logging
import sys
from pathlib import Path

from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.report.model_card import model_card
from mmopd.runtime import logs
from mmopd.runtime.run_folder import RunFolder, step_of
from mmopd.train import distributed
from mmopd.train.checkpoint import load
from mmopd.train.export import export
from mmopd.train.rank import joined
from mmopd.train.trainer import Trainer

logger = logging.getLogger("mmopd.train.export_rank")


def main() -> int:
    """Load the checkpoint and write the export; return the exit status, 0 or that of the UserError."""
    logs.start(f"export{distributed.own_rank()}")
    folder, checkpoint, out = map(Path, sys.argv[1:])
    run = RunFolder(folder)
    recipe = run.recipe()
    try:
        with joined(run, "export", recipe.train.timeout) as (ranks, watchdog), watchdog:
            trainer = Trainer(
                recipe.student.model, Encoder(recipe.student.model), recipe.train, recipe.algorithm, ranks
            )
            load(trainer, checkpoint)
            export(trainer, out, model_card(run, step_of(checkpoint.name)))
    except UserError as error:
        logger.error("%s", error)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
