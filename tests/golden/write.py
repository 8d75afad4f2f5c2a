"""Write `losses.json`, the golden losses of this machine, from a revision or from the working tree.

Do it in a commit of its own, and only when a change is meant to change the mathematics, or when a pinned library has.
"""

import argparse
import json

from runner import LOSSES, checkout, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision", nargs="?", help="a git revision; the working tree if not given")
    with checkout(parser.parse_args().revision) as root:
        found = run(root, "full")
    cases = ",\n".join(f'  "{case}": {{\n{lists(values)}\n  }}' for case, values in found["cases"].items())
    LOSSES.write_text(f'{{"machine": {json.dumps(found["machine"])},\n "cases": {{\n{cases}\n}}}}\n', encoding="utf-8")


def lists(values: dict[str, list[object]]) -> str:
    """Return the lists of a case, one a line; floats are written so that they read back to the bit."""
    return ",\n".join(f'    "{name}": {json.dumps(value)}' for name, value in values.items())


if __name__ == "__main__":
    main()
