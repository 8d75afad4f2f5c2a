"""`python -m mmopd`: the command line, where the `mmopd` script is not on the path."""

import sys

if not sys.flags.safe_path:
    # `python -m` looks into the current folder first, whose files are the user's (`mmopd.runtime.python`).
    here = sys.path.pop(0)
    if not any(finder.find_spec("mmopd", None) for finder in sys.meta_path):
        sys.exit(
            f"error: mmopd is in {here}, but not installed, and the processes that it starts would not find it: "
            f"`pip install -e {here}`, or set PYTHONPATH={here}"
        )

from mmopd.cli import main

main()
