"""Compare the losses of two revisions on this machine, to the bit.

Each revision is checked out into a temporary git worktree, and its own worker trains on the responses recorded here.
The exit status is 0 if each case of A has the same losses, gradient norms and weights in B, else 1.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table
from runner import Difference, checkout, differences, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("a", metavar="REV_A", help="a git revision")
    parser.add_argument("b", metavar="REV_B", nargs="?", help="another one; the working tree if not given")
    parser.add_argument(
        "--quick", action="store_true", help="what the test runs: 10 updates instead of 40, in half of the cases"
    )
    given = parser.parse_args()
    results = []
    for revision in (given.a, given.b):
        with checkout(revision) as root:
            results.append(run(root, "quick" if given.quick else "full"))
    a, b = results
    compared = differences(a, b)
    print_table(compared, given.a, given.b or "the working tree")
    missing = [case for case in a["cases"] if case not in b["cases"]]
    for case in missing:
        print(f"{case}: only in {given.a}")
    for case in (case for case in b["cases"] if case not in a["cases"]):
        print(f"{case}: only in {given.b or 'the working tree'}; not compared")
    return int(bool(missing) or not all(one.identical for one in compared))


def print_table(compared: list[Difference], a: str, b: str) -> None:
    table = Table(title=f"{a} and {b}: largest difference over the updates, |a - b| / max(1, |a|)")
    for heading in ("case", "updates", "loss", "gradient norm", "weights", "first difference"):
        table.add_column(heading)
    for one in compared:
        first = "none" if one.first is None else f"update {one.first}"
        table.add_row(
            one.case,
            str(one.updates),
            f"{one.loss:.1e}",
            f"{one.grad_norm:.1e}",
            "differ" if one.weights else "equal",
            first,
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
