"""One training rank: `python -m mmopd.train.rank RUN [SOURCE]...`, with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set.

`mmopd train` starts the ranks of one machine; any launcher that sets these variables starts them on several. The
SOURCEs are those that were added or removed on purpose before a resume.
"""

import asyncio
import sys
from pathlib import Path

import torch

from mmopd.errors import UserError
from mmopd.run import RunFolder
from mmopd.train import distributed
from mmopd.train.loop import train


def main() -> int:
    """Train; a UserError ends with its message and status 2."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # several processes with more threads than cores slow each other down 20 times
    run = RunFolder(Path(sys.argv[1]))
    try:
        recipe = run.recipe()
        ranks = distributed.start(recipe.train.timeout)
        try:
            asyncio.run(train(run, recipe, ranks, sys.argv[2:]))
        finally:
            distributed.stop()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
