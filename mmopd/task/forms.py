r"""Answers as mathematics: numbers with units, lists, sets, tuples, intervals, relations, matrices, dates and times.

`form` reads a whole text; what it does not understand as a whole stays a `Words`, which equals only the same words.
"""

import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

from mmopd.task import dates, expression, tex, units, values, vectors
from mmopd.task.expression import Node, UnreadableError

RELATION = re.compile(r"\\(?:le|ge|ne|lt|gt|approx)(?![A-Za-z])|<=|>=|!=|[<>=]")
OPERATORS = {"<=": "le", ">=": "ge", "!=": "ne", "<": "lt", ">": "gt", "=": "="}
MIRRORED = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt", "ne": "ne", "=": "=", "approx": "approx"}
NAME = re.compile(
    r"(?:P|Pr|\\Pr|E|Var|D|n|N)\s*\([^()]*\)|\|[A-Z][^|=]*\||\\(?:vec|overrightarrow|hat|bar|tilde)\s*\{?\s*[A-Za-z]{1,2}\s*\}?"
    r"|(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?[^{}]*\}?|_[A-Za-z0-9])?'*(?:\((?:[A-Za-z0-9]|\\[a-z]+)(?:, ?[A-Za-z0-9])*\))?"
    r"|(?:\\(?:angle|triangle|vec|overline|overrightarrow|mathbb)\s*\{?\s*)?[A-Z]{1,4}\}?"
    r"|\([A-Za-z](?:, ?[A-Za-z])+\)"
    r"|[A-Za-z][A-Za-z ]*[A-Za-z](?:\s*\([A-Za-z]\))?|\|[A-Z]{2}\||[A-Z]\([A-Z]\)|m\s*\\angle\s*[A-Z]+"
)
WORD = r"(?:\b(?:and|or)\b|(?<=\s)(?:und|oder|et|ou|và|и|или)(?=\s)|[和与及或])"  # between the items of a list
EITHER = re.compile(r"or|oder|ou|или|或|\\cup")
JOINED = re.compile(rf"\s*(?:(?:[,;]\s*)?{WORD}|,|;|\\cup(?![A-Za-z]))\s*")
SEQUENCE = re.compile(r"\d+(?: ?- ?\d+){2,}")
PRODUCT = re.compile(r"[abcd]{3}|[xyz]{3}|[pqrs]{3}|[uvw]{3}|[b-df-hj-np-tv-xz]{3}")
ENDING = re.compile(r"\.\d+(?![\d(]|\s*\\(?:overline|dot|bar|ldots)|\.\.)")  # a decimal fraction that ends
RATIO = re.compile(r"[^:]+(?:\s*:\s*[^:]+)+")
BASE = re.compile(
    r"\(?\s*([0-9A-Fa-f .]+?)\s*\)?\s*_\s*\{?\s*\(?(two|three|four|five|six|seven|eight|nine|ten|\d{1,2})\)?\s*\}?"
)
BASES = dict(zip(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], range(2, 11), strict=True))
CONGRUENCE = re.compile(r"(?:([^\\]+?)\\equiv)?([^\\]+?)\(?\s*(?:\\pmod|\\bmod|\\mod|mod)\s*\{?\s*(\d+)\s*\}?\s*\)?")
MATRIX = re.compile(r"[\[(]?\s*\\begin\{([bpBvV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\s*[\])]?")
SYSTEM = re.compile(
    r"(?:\\begin\{(cases|aligned|gathered)\}|\\\{\s*\\begin\{(array|aligned|matrix)\}(?:\{[lcr|]*\})?)(.*)"
    r"\\end\{(?:\1|\2)\}"
)
TRANSPOSED = re.compile(r"(.*[)}\]])\s*\^\s*\{?\s*(?:T|\\top|\\intercal|\\mathsf\s*T)\s*\}?")
FIGURE = re.compile(r"\\(triangle|angle)\s*\{?\s*([A-Z](?: ?[A-Z]){0,5})\s*\}?")
NOTHING = re.compile(
    r"\\emptyset|\\\{\s*\\\}|(?:the )?empty set|(?:there (?:is|are) )?no (?:real )?solutions?", re.IGNORECASE
)
ROUNDED = Fraction(1, 20)  # how far the sides of an approximation may be apart
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NEGATIVE_INFINITY: Node = ("*", ("n", Fraction(-1)), ("infty",))
INFINITY: Node = ("infty",)
EVERYTHING = {r"\mathbb{R}", r"\mathbb R", "R", "all real numbers", "all reals", "all real x"}
EXCEPT = re.compile(r"\\mathbb\s*\{?\s*R\s*\}?\s*(?:\\setminus|\\backslash|-|\\)\s*(\\\{.*\\\})")


@dataclass(frozen=True)
class Words:
    """A text that is compared as a text."""

    text: str
    known: bool = False  # it is understood: a date, a time


@dataclass(frozen=True)
class Value:
    """An expression, with a unit and with the name that stood before `=`."""

    node: Node
    unit: units.Unit | None = None
    name: str = ""
    decimal: bool = False
    percent: bool = False
    others: tuple["Value", ...] = ()  # further sides of an approximation


@dataclass(frozen=True)
class Group:
    """Values in brackets or in a list.

    `kind` is `set` or `list`, whose order does not count, `except`, which means all numbers but these, or the two
    brackets of a tuple or an interval.
    """

    kind: str
    items: tuple["Form", ...]
    joined: str = ","


@dataclass(frozen=True)
class Relation:
    """An equation or an inequality that is not of the form `name = value`."""

    sign: str
    sides: tuple[Node, ...]


@dataclass(frozen=True)
class Tagged:
    """Values that must have the same tag: digits of a base, classes of a congruence, terms of a ratio, a matrix."""

    tag: str
    items: tuple[Any, ...] = field(default=())


Form = Words | Value | Group | Relation | Tagged


def form(text: str) -> Form:
    """Return the form of a prepared text; `Words` if it is not understood as a whole."""
    try:
        return _form(text)
    except (UnreadableError, RecursionError):
        return Words(text)


def _form(text: str) -> Form:
    if not text:
        raise UnreadableError("it is empty")
    for special in (_special, _system, _matrix):
        if (found := special(text)) is not None:
            return found
    parts, signs = tex.split(text, JOINED)
    if len(parts) > 1:
        if parts[-1] == "" or parts[0] == "":
            parts, signs = [part for part in parts if part], [sign for sign in signs if sign != ","] or [","]
        if not parts:
            raise UnreadableError("a list of nothing")
        if set(signs) == {"and"} and len(parts) == 2 and (between := _between(_form(parts[0]), _form(parts[1]))):
            return between
        if not parts:
            raise UnreadableError("nothing but signs that join")
        return _list(tuple(_form(part) for part in parts), signs)
    return _relation(text) or _brackets(text) or _value(text)


def _between(one: Form, other: Form) -> Form | None:
    """Return the interval of `x > a and x < b`; None if they are not two such relations."""
    for lower, upper in ((one, other), (other, one)):
        if isinstance(lower, Group) and isinstance(upper, Group) and len(lower.items) == len(upper.items) == 2:
            below, above = lower.items[1], upper.items[0]
            if below == Value(INFINITY) and above == Value(NEGATIVE_INFINITY):
                return Group(lower.kind[0] + upper.kind[1], (lower.items[0], upper.items[1]))
    return None


def _list(items: tuple[Form, ...], signs: list[str]) -> Form:
    """Return a list; a single item, or an expression with a condition, is itself."""
    if len(items) > 1 and isinstance(items[0], Value) and values.symbols(items[0].node):
        while len(items) > 1 and isinstance(items[-1], Group) and items[-1].kind == "except":
            items = items[:-1]  # where the expression has no value anyway
    if len(items) == 1:
        return items[0]
    if isinstance(items[0], Group) and items[0].kind == "except":  # `x\\ne 2, 3`
        items = tuple(Group("except", (item,)) if isinstance(item, Value) and not item.name else item for item in items)
    if all(isinstance(item, Group) and item.kind == "except" for item in items):
        return Group("except", tuple(one for item in items if isinstance(item, Group) for one in item.items))
    joined = "cup" if any("cup" in sign for sign in signs) else "or" if any(map(EITHER.search, signs)) else ","
    items = tuple(one for item in items for one in _spread(item))
    return (_gap(items) if joined != "," else None) or Group("list", items, joined)


def _gap(items: tuple[Form, ...]) -> Group | None:
    r"""Return all numbers but those between neighbours, of `(-\infty,2)\cup(2,\infty)`; None for other intervals."""
    ends = [item.items for item in items if isinstance(item, Group) and item.kind == "()" and len(item.items) == 2]
    if len(ends) < len(items):
        return None
    ends.sort(key=lambda pair: (pair[0] != Value(NEGATIVE_INFINITY), pair[1] == Value(INFINITY)))
    joined = all(above[0] == below[1] for below, above in pairwise(ends))
    if not joined or ends[0][0] != Value(NEGATIVE_INFINITY) or ends[-1][1] != Value(INFINITY):
        return None
    return Group("except", tuple(pair[1] for pair in ends[:-1]))


def _spread(item: Form) -> tuple[Form, ...]:
    return item.items if isinstance(item, Group) and item.kind == "list" else (item,)


def _special(text: str) -> Form | None:
    """Return a form that is known by how it looks; None if it is none of these."""
    for known in (_words, _numbers, _tagged):
        if (found := known(text)) is not None:
            return found
    return None


def _words(text: str) -> Words | None:
    """Return a date, a time, a sequence of digits, or the name of a figure."""
    if moment := dates.read(text):
        return Words(moment, known=True)
    if found := FIGURE.fullmatch(text):
        return Words(f"{found[1]} {found[2].replace(' ', '')}", known=True)
    return Words(text.replace(" ", ""), known=True) if SEQUENCE.fullmatch(text) else None


def _numbers(text: str) -> Form | None:
    """Return `2 h 30 min`, all numbers, all but some, or none."""
    if (amount := units.compound(text)) is not None:
        return Value(("n", amount[0]), amount[1])
    if text in EVERYTHING:
        return Group("()", (Value(NEGATIVE_INFINITY), Value(INFINITY)))
    if NOTHING.fullmatch(text):
        return Group("set", ())
    inner = _form(found[1]) if (found := EXCEPT.fullmatch(text)) else None
    return Group("except", inner.items) if isinstance(inner, Group) and inner.kind == "set" else None


def _tagged(text: str) -> Tagged | None:
    """Return a vector, a number of another base, a congruence or a ratio."""
    if "=" not in text and (parts := vectors.components(text)):
        return Tagged("vector", tuple(map(Value, parts)))
    if (found := BASE.fullmatch(text)) and re.search(r"\d", found[1]):
        base, digits = found[2], found[1].replace(" ", "").upper().lstrip("0") or "0"
        return Tagged(f"base {BASES.get(base, base)}", (Words(digits, known=True),))
    if found := CONGRUENCE.fullmatch(text):
        modulus, rest = int(found[3]), values.exact(expression.read(found[2].strip().rstrip("(, ")))
        if rest is None or rest.denominator != 1 or modulus == 0:
            raise UnreadableError("a congruence without a number")
        return Tagged(f"{tex.compact(found[1] or '')} mod {modulus}", (Words(str(int(rest) % modulus), known=True),))
    if re.fullmatch(r"\d+(?: to \d+)+", text):
        text = text.replace("to", ":")
    if RATIO.fullmatch(text) and not re.search(r"[=<>|{\\]in\b|\\\{", text):
        terms, _ = tex.split(text, re.compile(":"))
        if len(terms) > 1:
            return Tagged("ratio", tuple(_value(term) for term in terms))
    return None


def _system(text: str) -> Form | None:
    """Return the list of the equations of `cases` or the like; None if it is none."""
    if not (found := SYSTEM.fullmatch(text)):
        return None
    rows = [re.sub(r"\s*&?\s*=\s*&?\s*", "=", row).strip(" ,;.") for row in tex.rows(found[3])]
    items = tuple(_form(row) for row in rows)
    if any("&" in row for row in rows) or any(isinstance(item, Value) and not item.name for item in items):
        raise UnreadableError("a system of other things than equations")
    return _list(items, [","])


def _matrix(text: str) -> Form | None:
    if found := TRANSPOSED.fullmatch(text):
        inner = _form(found[1])
        if isinstance(inner, Tagged) and inner.tag.startswith("matrix"):
            counts = re.findall(r"\d+", inner.tag)
            if len(counts) == 1 or set(counts) == {"1"}:
                return inner
        elif isinstance(inner, Group) and inner.kind == "()":
            return inner
        raise UnreadableError("a transposed matrix")
    found = MATRIX.fullmatch(text)
    if not found:
        return None
    if found[1] in {"vmatrix", "Vmatrix"}:
        raise UnreadableError("a determinant")
    rows = [row.split("&") for row in tex.rows(found[2])]
    cells = tuple(_value(cell.strip()) for row in rows for cell in row)
    return Tagged(f"matrix of rows {[len(row) for row in rows]}", cells)


def _relation(text: str) -> Form | None:
    """Return `name = value` as a named value, `x < 3` as an interval, another relation as such; None if it is none."""
    found = re.fullmatch(r"(.*?)\s*\\(?:in|notin)(?![A-Za-z])\s*(.*)", text)
    if found and not text.startswith(r"\{"):
        if r"\notin" in text or not NAME.fullmatch(found[1].strip()):
            raise UnreadableError("a membership")
        inner = _form(found[2])
        if not isinstance(inner, Group):
            raise UnreadableError("a membership in no set")
        return inner
    sides, signs = tex.split(text, RELATION)
    if len(sides) == 1:
        return None
    operators = [OPERATORS.get(sign, sign.lstrip("\\")) for sign in signs]
    if all(operator in {"=", "approx"} for operator in operators):
        return _equation(sides, operators)
    if sides[0] == "" and len(sides) == 2:
        sides[0] = "?"
        return _inequality((("s", "?"), _number(sides[1])), operators)
    return _inequality(tuple(_number(side) for side in sides), operators)


def _number(text: str) -> Node:
    return _plain_value(text).node


def _equation(sides: list[str], operators: list[str]) -> Form:
    if NAME.fullmatch(sides[-1]) and not NAME.fullmatch(sides[0]) and len(sides) == 2:
        sides = sides[::-1]
    named = bool(NAME.fullmatch(sides[0])) or sides[0] == ""
    name, rest = (sides[0], sides[1:]) if named else ("", sides)
    if named and len(rest) == 1:
        inner = _form(rest[0])
        return replace(inner, name=name) if isinstance(inner, Value) else inner
    each = [_plain_value(side) for side in rest]
    if "approx" in operators:
        if not all(values.close(one.node, other.node, ROUNDED) for one, other in pairwise(each)):
            raise UnreadableError("an approximation of another value")
        return replace(each[0], name=name, others=tuple(each[1:]))
    last = each[-1]
    if all(values.equal(one.node, last.node, rounded=one.decimal or last.decimal) for one in each):
        return replace(last, name=name)
    if named:
        raise UnreadableError("sides that differ")
    if len(each) != 2:
        raise UnreadableError("a chain of equations")
    return Relation("=", (each[0].node, each[1].node))


def _inequality(sides: tuple[Node, ...], operators: list[str]) -> Form:
    """Return an interval where a variable is compared with numbers."""
    constant = [not values.symbols(side) for side in sides]
    if len(sides) == 2 and "ne" not in operators and constant != [True, True]:
        if constant[0]:
            sides, operators, constant = sides[::-1], [MIRRORED[operators[0]]], constant[::-1]
        if sides[0][0] == "abs" and sides[0][1][0] == "s" and constant[1]:
            return _around(sides[1], operators[0])
        if sides[0][0] == "s" and constant[1]:
            closed = operators[0] in {"le", "ge"}
            if operators[0] in {"lt", "le"}:
                return Group("(]" if closed else "()", (Value(NEGATIVE_INFINITY), Value(sides[1])))
            return Group("[)" if closed else "()", (Value(sides[1]), Value(INFINITY)))
    if operators == ["ne"] and constant == [True, False]:
        sides, constant = sides[::-1], constant[::-1]
    if operators == ["ne"] and sides[0][0] == "s" and sides[0][1] != "?" and constant[1]:
        return Group("except", (Value(sides[1]),))
    if len(sides) == 3 and constant == [True, False, True] and sides[1][0] == "s":
        if set(operators) <= {"gt", "ge"}:
            sides, operators = sides[::-1], [MIRRORED[operator] for operator in operators[::-1]]
        if set(operators) <= {"lt", "le"}:
            kind = ("[" if operators[0] == "le" else "(") + ("]" if operators[1] == "le" else ")")
            return Group(kind, (Value(sides[0]), Value(sides[2])))
    if len(sides) != 2:
        raise UnreadableError("a chain of inequalities")
    return Relation(operators[0], sides)


def _around(bound: Node, operator: str) -> Form:
    """Return the interval of `|x| < bound`, or the two of `|x| > bound`."""
    minus: Node = ("*", ("n", Fraction(-1)), bound)
    closed = operator in {"le", "ge"}
    if operator in {"lt", "le"}:
        return Group("[]" if closed else "()", (Value(minus), Value(bound)))
    lower = Group("(]" if closed else "()", (Value(NEGATIVE_INFINITY), Value(minus)))
    upper = Group("[)" if closed else "()", (Value(bound), Value(INFINITY)))
    return Group("list", (lower, upper), "or")


def _brackets(text: str) -> Form | None:
    """Return a tuple, an interval or a set; None if the text is not all inside of one pair of brackets with a comma."""
    bare = re.sub(r"^\\langle\s*(.*)\\rangle$", r"(\1)", re.sub(r"^[A-Z]'?\s*(?=\([^()]*[,;][^()]*\)$)", "", text))
    is_set = bare.startswith(r"\{") and bare.endswith(r"\}")
    bare = bare[1:-2] + "}" if is_set else bare
    if bare[:1] not in tex.OPEN or bare[-1:] not in tex.CLOSE or len(bare) < 2:
        return None
    depth = 0
    for at, sign in enumerate(bare):
        depth += (sign in tex.OPEN) - (sign in tex.CLOSE)
        if depth == 0 and at < len(bare) - 1:
            return None
    inner = bare[1:-1].replace("\\{", "{").replace("\\}", "}") if is_set else bare[1:-1]
    if is_set and re.search(r"[|:]", inner):
        condition = re.fullmatch(r"\s*[a-z]\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?)?\s*[|:]\s*([^|]+)", inner)
        if not condition or not isinstance(found := _form(condition[1]), Group):
            raise UnreadableError("a set with a condition")
        return found
    parts = tex.items(inner)
    if len(parts) < 2 and not is_set:
        return _form(inner.strip()) if bare[0] in "({" and bare[-1] in ")}" else None
    items = tuple(_form(part) for part in parts)
    if bare[0] == "[" and all(isinstance(item, Group) and item.kind == "[]" for item in items):
        rows = [item.items for item in items if isinstance(item, Group)]
        return Tagged(f"matrix of rows {[len(row) for row in rows]}", tuple(cell for row in rows for cell in row))
    return Group("set" if is_set or bare[0] == "{" else bare[0] + bare[-1], items)


def _value(text: str) -> Form:
    return _plain_value(text)


def _plain_value(text: str) -> Value:
    """Return an expression with its unit."""
    if re.fullmatch("[a-z]{3}", text) and not PRODUCT.fullmatch(text) and text not in expression.FUNCTIONS:
        raise UnreadableError("a word")
    bare, unit = units.split(text)
    percent = bare.endswith("%") or (unit is not None and ("%", 1) in unit.bases)
    bare = bare.removesuffix("%").strip() if percent else bare
    if percent and unit is not None:
        unit = None
    scale = re.fullmatch(r"(.*[\d}])\s*(thousand|million|billion|trillion)", bare)
    node = expression.read(scale[1] if scale else bare)
    node = ("*", node, ("n", Fraction(SCALES[scale[2]]))) if scale else node
    return Value(node, unit, decimal=bool(ENDING.search(bare)), percent=percent)
