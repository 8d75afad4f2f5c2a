r"""Vectors in unit vectors: `3\mathbf i-4\mathbf j` has the components 3, -4 and 0."""

import re
from fractions import Fraction

from mmopd.task import expression, values
from mmopd.task.expression import Node, UnreadableError

MARKED = re.compile(
    r"\\(?:hat|widehat|vec|bar|overline|overrightarrow)\s*(?:\{\s*(?:\\([ij])math|([ijk]))\s*\}|\\([ij])math(?![A-Za-z])|"
    r"([ijk])(?![A-Za-z]))"
)
LETTER_J = re.compile(r"(?<![A-Za-z\\])j(?![A-Za-z])")
AXES = "ijk"


def components(text: str) -> tuple[Node, Node, Node] | None:
    """Return the three components of a vector; None if the text is none, such as the complex number `3+4i`."""
    bare = MARKED.sub(lambda found: " " + next(part for part in found.groups() if part) + " ", text)
    if bare == text and not (LETTER_J.search(text) or ("i" in text and "k" in text)):
        return None
    try:
        node = _renamed(expression.read(" ".join(bare.split())))
    except (UnreadableError, RecursionError):
        return None
    names = [f"axis {axis}" for axis in AXES]
    if not values.symbols(node) or not values.symbols(node) <= set(names):
        return None
    x, y, z = (_at(node, {name: int(name == one) for name in names}) for one in names)
    total: Node = ("n", Fraction(0))
    for name, part in zip(names, (x, y, z), strict=True):
        total = ("+", total, ("*", part, ("s", name)))
    return (x, y, z) if values.equal(node, total) else None


def _renamed(node: Node) -> Node:
    if node[0] == "s" and node[1] in AXES:
        return ("s", f"axis {node[1]}")
    return tuple(_renamed(part) if isinstance(part, tuple) else part for part in node)


def _at(node: Node, point: dict[str, int]) -> Node:
    if node[0] == "s" and node[1] in point:
        return ("n", Fraction(point[node[1]]))
    return tuple(_at(part, point) if isinstance(part, tuple) else part for part in node)
