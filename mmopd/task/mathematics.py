"""Compares an answer with a key as mathematics, both of them as a whole."""

import re
from fractions import Fraction
from itertools import product
from typing import TypeGuard

from mmopd.task import expression, forms, normal, tex, units, values
from mmopd.task.expression import Node
from mmopd.task.forms import Form, Group, Relation, Tagged, Value, Words

RANGE = re.compile(r"\d+ ?- ?\d+")  # a key that is no difference; no key is left to be computed
FUNCTION_NAME = re.compile(r"[a-z]\([a-z]\)")
NO_WORD = re.compile(rf"(?i:{forms.PRODUCT.pattern}|{expression.FUNCTION.pattern}|frac|binom|pi)")
CONSTANT = re.compile(r"(?<![ab])(?<![ab] )\+\s*[cC]$")  # of integration; `a+b+c` has none
GLUED = re.compile(r"(?<=\d)(?=[A-Za-z]$)")  # `2h`
SEQUENCES = {"list", "()", "[]"}  # the same where the order of a list counts; two numbers may be an interval
LETTERS = re.compile(r"[A-Z](?:[, ]+[A-Z])+")  # moves such as `N, E, E, S`
ZERO: Node = ("n", Fraction(0))
LONGEST_LIST = 64  # items whose order does not count
WORD_NAME = re.compile(r"[^\\]*[A-Za-z ]{3,}[^\\]*")


def same(said: str, gold: str, *, ordered: bool = False) -> bool | None:
    """Return True if the answer says the same as the key, and None if the key is not understood as a whole.

    What is not understood as a whole equals only the same text.

    Args:
        ordered: the order of a list counts.
    """
    ours, theirs = tex.prepared(said), tex.prepared(gold)
    if CONSTANT.search(theirs):
        ours, theirs = (CONSTANT.sub("+ C", text) for text in (ours, theirs))
    if ordered and LETTERS.fullmatch(theirs) and _moves(ours) == _moves(theirs):
        return True
    if (text := tex.compact(ours)) == tex.compact(theirs) or _wording(said) == _wording(gold) != "":
        return re.fullmatch(r"[-+.]*", text) is None
    key = forms.form(theirs)
    if isinstance(key, Words):
        key = forms.form(tex.ungrouped(theirs))
    if not understood(key):
        return True if ordered and _moves(ours) == _moves(theirs) else None
    if isinstance(key, Value) and not values.symbols(key.node):
        ours = tex.ungrouped(ours) if key.unit is None else GLUED.sub(" ", tex.ungrouped(ours))
    if RANGE.fullmatch(theirs):
        return False
    try:
        return alike(forms.form(ours), key, ordered)
    except (RecursionError, ArithmeticError, ValueError):
        return False


def _moves(text: str) -> str:
    """Return a sequence that is not understood, such as `L2 R3` or `A -> B`, as it is compared with another one."""
    return re.sub(r"[,;]", "", tex.compact(text)).casefold()


def _wording(text: str) -> str:
    """Return a text with a word in it as it is compared with another one; empty without a word."""
    bare = normal.undressed(text).strip(" .,:;!?'\"")
    words = [word for word in re.findall(r"[^\W\d_]{3,}", bare) if not NO_WORD.fullmatch(word)]
    return bare.casefold() if words and "\\" not in bare else ""


def understood(form: Form) -> bool:
    """Return True if no part of it is text that has to be the same."""
    if isinstance(form, Words):
        return form.known
    if isinstance(form, Group | Tagged):
        return all(understood(item) for item in form.items)
    return True


def alike(ours: Form, theirs: Form, ordered: bool = False) -> bool:
    """Compare two forms; see `same`."""
    if isinstance(ours, Words) or isinstance(theirs, Words):
        return isinstance(ours, Words) and isinstance(theirs, Words) and ours.text.casefold() == theirs.text.casefold()
    if isinstance(ours, Value) and isinstance(theirs, Value):
        both = [_expanded(ours), _expanded(theirs)]
        return _groups(both[0], both[1], ordered) if {len(one.items) for one in both} != {1} else _values(ours, theirs)
    if isinstance(ours, Tagged) and isinstance(theirs, Tagged):
        tags = {ours.tag, theirs.tag}
        if "vector" in tags and len(tags) == 2:
            return _column(ours, theirs)
        same_tag = len(tags) == 1 or ({"mod"} <= {tag.split()[0] for tag in tags} and len({*map(_modulus, tags)}) == 1)
        return same_tag and _pairwise(ours.items, theirs.items, ordered)
    if isinstance(ours, Tagged) or isinstance(theirs, Tagged):
        return _column(ours, theirs)
    if isinstance(ours, Relation | Value) and isinstance(theirs, Relation | Value):
        return _relations(_as_relation(ours), _as_relation(theirs))
    if isinstance(ours, Relation) or isinstance(theirs, Relation):
        return False
    return _groups(_expanded(ours), _expanded(theirs), ordered)


def _modulus(tag: str) -> str:
    return tag.rpartition(" mod ")[2]


def _expanded(form: Group | Value) -> Group:
    """Return the group, with both values of ± instead of it; a value becomes a list of one."""
    items = form.items if isinstance(form, Group) else (form,)
    kind, joined = (form.kind, form.joined) if isinstance(form, Group) else ("list", ",")
    if kind not in {"list", "set", "except"}:
        return Group(kind, items, joined)
    return Group(kind, tuple(one for item in items for one in _signs(item)), joined)


def _signs(item: Form) -> list[Form]:
    if not isinstance(item, Value) or not values.has(item.node, ("pm",)):
        return [item]
    return [Value(_with_sign(item.node, sign), item.unit, item.name, item.decimal, item.percent) for sign in (1, -1)]


def _with_sign(node: Node, sign: int) -> Node:
    if node[0] == "pm":
        return ("n", Fraction(node[1] * sign))
    return tuple(_with_sign(part, sign) if isinstance(part, tuple) else part for part in node)


def _groups(ours: Group, theirs: Group, ordered: bool) -> bool:
    kinds = {ours.kind, theirs.kind}
    if kinds <= {"list", "set"}:
        if len(ours.items) != len(theirs.items):
            return False
        if not _joined_alike(ours, theirs):
            return len(ours.items) == 1 and alike(ours.items[0], theirs.items[0])
        if ordered and theirs.kind != "set":
            return _pairwise(ours.items, theirs.items, ordered)
        return _unordered(ours.items, theirs.items)
    if kinds == {"except"}:
        return _unordered(ours.items, theirs.items)
    if len(kinds) == 1 or (ordered and kinds <= SEQUENCES and (len(ours.items) > 2 or "list" in kinds)):
        return _pairwise(ours.items, theirs.items, ordered)
    for one, other in ((ours, theirs), (theirs, ours)):
        if one.kind == "list" and other.kind == "()" and (named := _by_name(one)):
            return _pairwise(named, other.items, ordered)
        if one.kind == "list" and len(one.items) == 1 and isinstance(one.items[0], Group):
            return alike(one.items[0], other) if one is ours else alike(other, one.items[0])
    return False


def _joined_alike(ours: Group, theirs: Group) -> bool:
    """Return True if two lists of intervals or relations are both unions or both not; `or` also joins points."""
    items = (*ours.items, *theirs.items)
    joints = {ours.joined, theirs.joined}
    if not any(isinstance(item, Group | Relation) for item in items) or len(joints) == 1 or joints == {"or", "cup"}:
        return True
    points = all(isinstance(item, Group) and not any(map(_endless, item.items)) for item in items)
    return joints == {"or", ","} and points


def _endless(item: Form) -> bool:
    return isinstance(item, Value) and values.has(item.node, ("infty",))


def _by_name(group: Group) -> tuple[Form, ...]:
    """Return the values of `y=2, x=1` in the order of their names; empty if they are not all named."""
    named = {item.name: item for item in group.items if isinstance(item, Value) and item.name}
    return tuple(named[name] for name in sorted(named)) if len(named) == len(group.items) else ()


def _pairwise(ours: tuple[Form, ...], theirs: tuple[Form, ...], ordered: bool) -> bool:
    return len(ours) == len(theirs) and all(alike(a, b, ordered) for a, b in zip(ours, theirs, strict=True))


def _unordered(ours: tuple[Form, ...], theirs: tuple[Form, ...]) -> bool:
    if _pairwise(ours, theirs, False):
        return True
    left = list(theirs)
    if len(left) > LONGEST_LIST or len(left) != len(ours):
        return False
    for item in ours:
        found = next((i for i, other in enumerate(left) if alike(item, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def _column(ours: Form, theirs: Form) -> bool:
    """Compare a matrix of one column or row with a tuple."""
    a, b = _entries(ours), _entries(theirs)
    if a and b and len(a) == 3 and len(b) == 2:
        b = (*b, Value(ZERO)) if _is_vector(ours) else b
    elif a and b and len(a) == 2 and len(b) == 3:
        a = (*a, Value(ZERO)) if _is_vector(theirs) else a
    return a is not None and b is not None and _pairwise(a, b, False)


def _entries(form: Form) -> tuple[Form, ...] | None:
    """Return the parts of a tuple or of a matrix that is one; None for another form."""
    if _is_vector(form):
        return form.items
    if isinstance(form, Tagged) and re.fullmatch(r"matrix of rows \[(1(, 1)*|\d+)\]", form.tag):
        return form.items
    return form.items if isinstance(form, Group) and form.kind == "()" else None


def _is_vector(form: Form) -> TypeGuard[Tagged]:
    return isinstance(form, Tagged) and form.tag == "vector"


def _as_relation(form: Relation | Value) -> Relation | None:
    if isinstance(form, Relation):
        return form
    if re.fullmatch(r"[A-Za-z]", form.name) and form.unit is None:
        return Relation("=", (("s", form.name), form.node))
    return None


def _relations(ours: Relation | None, theirs: Relation | None) -> bool:
    """Return True if one relation is the other one times a number; a positive one for inequalities."""
    if ours is None or theirs is None:
        return False
    if ours.sign != theirs.sign and forms.MIRRORED[ours.sign] == theirs.sign:
        ours = Relation(theirs.sign, ours.sides[::-1])
    if ours.sign != theirs.sign:
        return False
    a, b = (("+", one.sides[0], ("*", ("n", Fraction(-1)), one.sides[1])) for one in (ours, theirs))
    names = sorted(values.symbols(a))
    if names != sorted(values.symbols(b)):
        return False
    for point in values.points(names):
        try:
            x, y = values.number(a, point), values.number(b, point)
        except values.UndefinedError:
            continue
        if x == 0 or y == 0:
            continue
        factor = values.nearby(x / y)
        if factor is None or (ours.sign not in {"=", "ne"} and factor < 0):
            return False
        return values.equal(a, ("*", ("n", factor), b))
    return False


def _values(ours: Value, theirs: Value) -> bool:
    if ours.name and theirs.name and not _same_name(ours.name, theirs.name):
        return _relations(_as_relation(ours), _as_relation(theirs))
    sides = product((ours, *ours.others), (theirs, *theirs.others))
    return any(_quantities(a, b) for a, b in sides)


def _same_name(ours: str, theirs: str) -> bool:
    a, b = (re.sub(r"[\s{}|]|\\(?:overline|vec|angle|triangle)", "", name) for name in (ours, theirs))
    a, b = (re.sub(r"^([a-z])\(([nkm])\)$", r"\1_\2", name) for name in (a, b))  # a(n) is a_n
    if "y" in {a, b} and any(FUNCTION_NAME.fullmatch(name) for name in (a, b)):
        return True
    if a == b or any(WORD_NAME.fullmatch(name) for name in (ours, theirs)):
        return True
    return a.partition("_")[0] == b.partition("_")[0] and ("_" in a) != ("_" in b)


def _quantities(ours: Value, theirs: Value) -> bool:
    rounded = ours.decimal != theirs.decimal
    factors = _factors(ours, theirs)
    return any(
        values.equal(("*", ("n", a), ours.node), ("*", ("n", b), theirs.node), rounded=rounded) for a, b in factors
    ) or _angle(ours, theirs, rounded)


def _factors(ours: Value, theirs: Value) -> list[tuple[Fraction, Fraction]]:
    """Return the factors by which both may be multiplied to be equal; none if their units do not fit."""
    one, hundred = Fraction(1), Fraction(100)
    if ours.percent != theirs.percent:
        if (ours if theirs.percent else theirs).unit is not None:
            return []
        return [(one, one), (one, hundred) if ours.percent else (hundred, one)]
    if ours.unit is None or theirs.unit is None:
        return [(one, one)]
    if ours.unit.bases != theirs.unit.bases:
        return [(one, one)] if not (ours.unit.bases and theirs.unit.bases) else []
    return [(ours.unit.factor, theirs.unit.factor)]


def _angle(ours: Value, theirs: Value, rounded: bool) -> bool:
    """Compare degrees with a number of radians."""
    for degrees, radians in ((ours, theirs), (theirs, ours)):
        if _is_angle(degrees.unit, "angle") and (radians.unit is None or _is_angle(radians.unit, "rad")):
            node = ("*", ("/", ("pi",), ("n", Fraction(180))), degrees.node)
            return values.has(radians.node, ("pi",)) and values.equal(node, radians.node, rounded=rounded)
    return False


def _is_angle(unit: units.Unit | None, base: str) -> bool:
    return unit is not None and unit.bases == frozenset({(base, 1)})
