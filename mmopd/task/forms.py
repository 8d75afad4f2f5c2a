r"""Answers as mathematics: numbers with units, lists, sets, tuples, intervals, relations, matrices, dates and times.

`form` reads a whole text; what it does not understand as a whole stays a `Words`, which equals only the same words.
"""

import re
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from mmopd.task import expression, normal, units, values
from mmopd.task.expression import Node, UnreadableError

COMMANDS = {
    r"[dtc]?frac": "frac", r"[dt]binom": "binom", r"leqslant|leqq|leq|le": "le",
    r"geqslant|geqq|geq|ge": "ge",
    r"neq|ne": "ne", r"lt": "lt", r"gt": "gt", r"thickapprox|approx|approxeq|simeq|doteq|fallingdotseq": "approx",
    r"varnothing|emptyset": "emptyset", r"lbrace": "{", r"rbrace": "}", r"lbrack": "[", r"rbrack": "]", r"lparen": "(",
    r"rparen": ")", r"vert|mid|lvert|rvert": "|", r"land|wedge": "and", r"lor|vee": "or", r"colon": ":", r"ast": "*",
    r"degree|textdegree": "^\\circ", r"overline|bar": "overline", r"infin|infty": "infty", r"dots|ldots|cdots": "ldots",
    r"Longrightarrow|Rightarrow|implies|therefore|because": "", r"mathbf": "",
}  # fmt: skip
SIGNS = {
    "×": r"\times ", "·": r"\cdot ", "÷": "/", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≦": r"\le ",
    "≧": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≃": r"\approx ", "≅": r"\approx ", "π": r"\pi ", "∞": r"\infty ",
    "°": r"^\circ ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "∅": r"\emptyset ", "Ø": r"\emptyset ",
    "≡": r"\equiv ", "⟨": r"\langle ", "⟩": r"\rangle ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}", "∖": r"\setminus ", "∧": " and ", "∨": " or ", "≪": r"\ll ", "−": "-", "⋯": r"\ldots ",
    "%": "%", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∣": "|",
}  # fmt: skip
ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?)")
RELATION = re.compile(r"\\(?:le|ge|ne|lt|gt|approx)(?![A-Za-z])|<=|>=|!=|[<>=]")
OPERATORS = {"<=": "le", ">=": "ge", "!=": "ne", "<": "lt", ">": "gt", "=": "="}
MIRRORED = {"le": "ge", "ge": "le", "lt": "gt", "gt": "lt", "ne": "ne", "=": "=", "approx": "approx"}
NAME = re.compile(
    r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?[^{}]*\}?|_[A-Za-z0-9])?'*(?:\((?:[A-Za-z0-9]|\\[a-z]+)(?:, ?[A-Za-z0-9])*\))?"
    r"|(?:\\(?:angle|triangle|vec|overline|overrightarrow|mathbb)\s*\{?\s*)?[A-Z]{1,4}\}?"
    r"|\([A-Za-z](?:, ?[A-Za-z])+\)"
    r"|[A-Za-z][A-Za-z ]*[A-Za-z](?:\s*\([A-Za-z]\))?|\|[A-Z]{2}\||[A-Z]\([A-Z]\)|m\s*\\angle\s*[A-Z]+"
)
JOINED = re.compile(r"\s*(?:,|;|\b(?:and|or)\b|\\cup(?![A-Za-z]))\s*")
DATE = re.compile(r"\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4}")
CLOCK = re.compile(r"(\d{1,2})(?:\s*:\s*(\d\d))?(?:\s*:\s*(\d\d))?\s*([ap])\.?\s*m\.?", re.IGNORECASE)
SEQUENCE = re.compile(r"\d+(?: ?- ?\d+){2,}")
PRODUCT = re.compile(r"[abcd]{3}|[xyz]{3}|[pqrs]{3}|[uvw]{3}|[b-df-hj-np-tv-xz]{3}")
RATIO = re.compile(r"[^:]+(?:\s*:\s*[^:]+)+")
BASE = re.compile(
    r"\(?\s*([0-9A-Fa-f .]+?)\s*\)?\s*_\s*\{?\s*\(?(two|three|four|five|six|seven|eight|nine|ten|\d{1,2})\)?\s*\}?"
)
BASES = dict(zip(["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"], range(2, 11), strict=True))
CONGRUENCE = re.compile(r"(.+?)\\equiv(.+?)\(?\s*(?:\\pmod|\\bmod|\\mod|mod)\s*\{?\s*(\d+)\s*\}?\s*\)?")
MATRIX = re.compile(r"\\begin\{([bpBvV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}")
ROW = "\u240a"  # instead of `\\\\`, which ends a row of a matrix
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
OPEN, CLOSE = "([{", ")]}"
NEGATIVE_INFINITY: Node = ("*", ("n", Fraction(-1)), ("infty",))
INFINITY: Node = ("infty",)
EVERYTHING = {r"\mathbb{R}", r"\mathbb R", "R", "all real numbers", "all reals"}


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

    `kind` is `set` or `list`, whose order does not count, or the two brackets of a tuple or an interval.
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


def latex(text: str) -> str:
    """Return the text as `form` and `expression.read` take it: one spelling of each sign and command."""
    text = normal.unwrapped(text.strip())
    text = ROOT.sub(r"\\sqrt{\1}", text)
    text = (
        normal.signs("".join(SIGNS.get(sign, sign) for sign in text)).replace("√", r"\sqrt ").replace("∛", r"\sqrt[3]")
    )
    text = re.sub(r"\\\\(?:\[[^\]]*\])?", ROW, text).replace("{,}", ",")
    text = (
        re.sub(r"(\d)\s*(?:\\[,;: ]|~)\s*(?=\d{3}(?!\d))", r"\1 ", text)
        if not re.search(r"\d~\d(?!\d\d)", text)
        else text
    )
    text = normal.SPACE.sub(" ", normal.NOTHING.sub("", normal.SWITCH.sub("", text)))
    text = re.sub(r"\\(?:textdollar|\$)", "$", text).replace(r"\%", "%").replace(r"\#", "#").replace(r"\&", "&")
    text = normal.without_fonts(text, " ").replace(r"\_", "_")
    for names, name in COMMANDS.items():
        plain = name if not name.isalpha() or name in {"and", "or"} else f"\\{name}"
        plain = f" {plain} " if name in {"and", "or"} else plain
        plain = f"{plain} " if plain[-1:].isalpha() else plain
        text = re.sub(rf"\\(?:{names})(?![A-Za-z])\s?", plain.replace("\\", r"\\"), text)
    text = "".join(SIGNS.get(sign, sign) for sign in text)
    text = text if r"\begin" in text else text.replace("&", " and ")
    text = re.sub(r"(?<=\d)\s*\^\s*(?:o|\{\s*o\s*\})(?![A-Za-z])", r"^\\circ ", text)
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])", r"^\\circ ", text)
    text = re.sub(r"\s+(?=[\^_])", "", re.sub(r"(?<!\\)\{\s*([^\w{}\\]?)\s*\}", r"\1", text))
    text = normal.unwrapped(" ".join(text.split()))
    text = re.sub(r"[α-ωΑ-Ω]", _greek, text)
    return re.sub(r"(?<=[\w)\]}%$!])\s*\.$", "", text.strip(" ,;")).strip()


def _greek(found: re.Match[str]) -> str:
    import unicodedata

    name = unicodedata.name(found[0]).rpartition(" ")[2]
    name = {"LAMDA": "lambda"}.get(name, name.lower())
    return f"\\{name.capitalize() if found[0].isupper() else name} "


def compact(text: str) -> str:
    """Return a prepared text without blanks and needless braces, for a comparison as text."""
    text = re.sub(r"\\(?=[{}])", "", text)
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", re.sub(r"\s+|\\ ", "", text)).strip("$.")


def form(text: str) -> Form:
    """Return the form of a prepared text; `Words` if it is not understood as a whole."""
    try:
        return _form(text)
    except (UnreadableError, RecursionError):
        return Words(text)


def _form(text: str) -> Form:
    if not text:
        raise UnreadableError("it is empty")
    for special in (_special, _matrix):
        if (found := special(text)) is not None:
            return found
    parts, signs = split(text, JOINED)
    if len(parts) > 1:
        if parts[-1] == "" or parts[0] == "":
            parts, signs = [part for part in parts if part], [sign for sign in signs if sign != ","] or [","]
        if set(signs) == {"and"} and len(parts) == 2 and (between := _between(_form(parts[0]), _form(parts[1]))):
            return between
        if not parts:
            raise UnreadableError("nothing but signs that join")
        joined = "or" if any(re.search(r"or|cup", sign) for sign in signs) else ","
        items = tuple(_form(part) for part in parts)
        if len(items) > 1:
            return Group("list", tuple(one for item in items for one in _spread(item)), joined)
        return items[0]
    return _relation(text) or _brackets(text) or _value(text)


def _between(one: Form, other: Form) -> Form | None:
    """Return the interval of `x > a and x < b`; None if they are not two such relations."""
    for lower, upper in ((one, other), (other, one)):
        if isinstance(lower, Group) and isinstance(upper, Group) and len(lower.items) == len(upper.items) == 2:
            below, above = lower.items[1], upper.items[0]
            if below == Value(INFINITY) and above == Value(NEGATIVE_INFINITY):
                return Group(lower.kind[0] + upper.kind[1], (lower.items[0], upper.items[1]))
    return None


def _spread(item: Form) -> tuple[Form, ...]:
    return item.items if isinstance(item, Group) and item.kind == "list" else (item,)


def split(text: str, pattern: re.Pattern[str]) -> tuple[list[str], list[str]]:
    """Return the parts between separators outside of brackets, and the separators."""
    parts, signs, start, depth, at = list[str](), list[str](), 0, 0, 0
    thousands = [found.span() for found in expression.THOUSANDS.finditer(text)]
    inside = {at for begin, end in thousands for at in range(begin, end)}
    while at < len(text):
        sign = text[at]
        if sign in OPEN or text.startswith(r"\langle", at):
            depth += 1
        elif sign in CLOSE or text.startswith(r"\rangle", at):
            depth -= 1
        found = pattern.match(text, at) if depth == 0 and at not in inside else None
        if found and found.end() > at:
            parts.append(text[start:at].strip())
            signs.append(found[0].strip())
            start = at = found.end()
        else:
            at += 1
    if depth != 0:
        raise UnreadableError("brackets do not match")
    return [*parts, text[start:].strip()], signs


def _special(text: str) -> Form | None:
    if DATE.fullmatch(text):
        return Words("-".join(part.zfill(2) for part in re.split("[-/.]", text)), known=True)
    if SEQUENCE.fullmatch(text):
        return Words(text.replace(" ", ""), known=True)
    if found := CLOCK.fullmatch(text):
        hour, minute, second, half = found.groups()
        return Words(f"{int(hour)}:{minute or '00'}:{second or '00'} {half.lower()}", known=True)
    if text in EVERYTHING:
        return Group("()", (Value(NEGATIVE_INFINITY), Value(INFINITY)))
    if text == r"\emptyset" or re.fullmatch(r"\\\{\s*\\\}", text):
        return Group("set", ())
    if (found := BASE.fullmatch(text)) and re.search(r"\d", found[1]):
        base = found[2]
        return Tagged(
            f"base {BASES.get(base, base)}", (Words(found[1].replace(" ", "").upper().lstrip("0") or "0", known=True),)
        )
    if found := CONGRUENCE.fullmatch(text):
        modulus, rest = int(found[3]), values.exact(expression.read(found[2].strip().rstrip("(, ")))
        if rest is None or rest.denominator != 1 or modulus == 0:
            raise UnreadableError("a congruence without a number")
        return Tagged(f"{compact(found[1])} mod {modulus}", (Words(str(int(rest) % modulus), known=True),))
    if RATIO.fullmatch(text) and not re.search(r"[=<>|{\\]in\b|\\\{", text):
        parts, _ = split(text, re.compile(":"))
        if len(parts) > 1:
            return Tagged("ratio", tuple(_value(part) for part in parts))
    return None


def _matrix(text: str) -> Form | None:
    found = MATRIX.fullmatch(text)
    if not found:
        return None
    if found[1] in {"vmatrix", "Vmatrix"}:
        raise UnreadableError("a determinant")
    rows = [row.split("&") for row in found[2].strip().strip(ROW).split(ROW)]
    cells = tuple(_value(cell.strip()) for row in rows for cell in row)
    return Tagged(f"matrix of rows {[len(row) for row in rows]}", cells)


def _relation(text: str) -> Form | None:
    """Return `name = value` as a named value, `x < 3` as an interval, another relation as such; None if it is none."""
    if found := re.fullmatch(r"(.*?)\s*\\(?:in|notin)(?![A-Za-z])\s*(.*)", text):
        if r"\notin" in text or not NAME.fullmatch(found[1].strip()):
            raise UnreadableError("a membership")
        inner = _form(found[2])
        if not isinstance(inner, Group):
            raise UnreadableError("a membership in no set")
        return inner
    sides, signs = split(text, RELATION)
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
        if sides[0][0] == "s" and constant[1]:
            closed = operators[0] in {"le", "ge"}
            if operators[0] in {"lt", "le"}:
                return Group("(]" if closed else "()", (Value(NEGATIVE_INFINITY), Value(sides[1])))
            return Group("[)" if closed else "()", (Value(sides[1]), Value(INFINITY)))
    if len(sides) == 3 and constant == [True, False, True] and sides[1][0] == "s":
        if set(operators) <= {"gt", "ge"}:
            sides, operators = sides[::-1], [MIRRORED[operator] for operator in operators[::-1]]
        if set(operators) <= {"lt", "le"}:
            kind = ("[" if operators[0] == "le" else "(") + ("]" if operators[1] == "le" else ")")
            return Group(kind, (Value(sides[0]), Value(sides[2])))
    if len(sides) != 2:
        raise UnreadableError("a chain of inequalities")
    return Relation(operators[0], sides)


def _brackets(text: str) -> Form | None:
    """Return a tuple, an interval or a set; None if the text is not all inside of one pair of brackets with a comma."""
    bare = re.sub(r"^\\langle\s*(.*)\\rangle$", r"(\1)", text)
    is_set = bare.startswith(r"\{") and bare.endswith(r"\}")
    bare = bare[1:-2] + "}" if is_set else bare
    if bare[:1] not in OPEN or bare[-1:] not in CLOSE or len(bare) < 2:
        return None
    depth = 0
    for at, sign in enumerate(bare):
        depth += (sign in OPEN) - (sign in CLOSE)
        if depth == 0 and at < len(bare) - 1:
            return None
    inner = bare[1:-1].replace("\\{", "{").replace("\\}", "}") if is_set else bare[1:-1]
    if is_set and re.search(r"[|:]", inner):
        condition = re.fullmatch(r"\s*[a-z]\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?)?\s*[|:]\s*([^|]+)", inner)
        if not condition or not isinstance(found := _form(condition[1]), Group):
            raise UnreadableError("a set with a condition")
        return found
    parts = _items(inner)
    if len(parts) < 2 and not is_set:
        return _form(inner.strip()) if bare[0] in "({" and bare[-1] in ")}" else None
    items = tuple(_form(part) for part in parts)
    return Group("set" if is_set or bare[0] == "{" else bare[0] + bare[-1], items)


def _items(text: str) -> list[str]:
    """Return the parts between commas; inside of brackets every comma separates."""
    parts, start, depth = list[str](), 0, 0
    for at, sign in enumerate(text):
        depth += (sign in OPEN) - (sign in CLOSE)
        if depth == 0 and sign in ",;":
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


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
    return Value(node, unit, decimal=bool(re.search(r"\d?\.\d", bare)), percent=percent)
