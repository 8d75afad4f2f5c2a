r"""Expressions in LaTeX or plain notation: read as a whole or not at all, and compared by their values.

`read` raises `UnreadableError` unless it understands every character, so no part of an answer is taken for the answer.
`equal` compares exactly where both values are rational, otherwise by 60 digits (at points, if there are variables).
"""

import re
from fractions import Fraction
from typing import Any

Node = tuple[Any, ...]  # (kind, parts...)

DECIMAL = re.compile(r"\d+(?:\.\d+)?|\.\d+")
THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:([, ])\d{3})(?:\1\d{3})*(?![\d,]| \d)(?:\.\d+)?")
SCIENTIFIC = re.compile(r"(\d+\.\d+|1)e([+-]?\d+)|(\d+)e(\d+)|(\d+(?:\.\d+)?)e([+-]0\d+)|(\d+(?:\.\d+)?)E([+-]?\d+)")
RECURRING = re.compile(
    r"(\d*\.\d*?)\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?"
    r"|(\d*\.\d*?)(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|\\(?:overline|bar|dot)\s*(\d)|\((\d+)\))"
)
ENDLESS = re.compile(r"(\d*\.\d*?)(\d+?)\2{2,}\s*(?:\\(?:ldots|dots|cdots)(?![A-Za-z])|\.\.\.)")
COMMAND = re.compile(r"\\([A-Za-z]+)\s*")
LETTERS = re.compile(r"[A-Za-z]+")
GREEK = frozenset(
    re.findall(
        r"\S+",
        "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
        "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell hbar",
    )
)
FUNCTIONS = re.findall(
    r"\S+",
    "arcsin arccos arctan arccot sinh cosh tanh coth sin cos tan cot sec csc asin acos atan exp ln lg log sqrt",
)
FUNCTION = re.compile("|".join(FUNCTIONS))
BEGINNINGS = frozenset(
    re.findall(r"\S+", "frac sqrt pi binom lfloor lceil lvert infty vec hat bar tilde mathbb overline")
)
INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "asin": "arcsin", "acos": "arccos",
           "atan": "arctan"}  # fmt: skip
CLOSING = {"(": ")", "[": "]", "{": "}"}
LARGEST = 20_000  # bits of an exact number; larger ones are compared by their leading digits


class UnreadableError(ValueError):
    """The text is not, as a whole, an expression."""


def read(text: str) -> Node:
    """Return the expression of a text that `tex.prepared` has prepared.

    Raises:
        UnreadableError: something of the text is not understood.
    """
    try:
        reader = _Reader(text)
        node = reader.sum()
        if not reader.at_end():
            raise UnreadableError(f"{text!r} is not understood from {text[reader.at :][:20]!r} on")
        return node
    except RecursionError:
        raise UnreadableError("it is nested too deeply") from None


class _Reader:
    """Reads an expression from left to right; each method consumes what it returns."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def blanks(self) -> None:
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1

    def at_end(self) -> bool:
        self.blanks()
        return self.at == len(self.text)

    def next(self) -> str:
        self.blanks()
        return self.text[self.at : self.at + 1]

    def take(self, pattern: "re.Pattern[str] | str") -> re.Match[str] | None:
        self.blanks()
        found = re.compile(pattern).match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def need(self, sign: str) -> None:
        self.blanks()
        if not self.text.startswith(sign, self.at):
            raise UnreadableError(f"{sign!r} is missing in {self.text!r}")
        self.at += len(sign)

    def sum(self) -> Node:
        first = self.take(r"[+-]|\\pm(?![A-Za-z])|\\mp(?![A-Za-z])")
        node = self.product()
        if first and first[0] != "+":
            node = ("*", _sign(first[0]), node)
        while sign := self.take(r"[+-]|\\pm(?![A-Za-z])|\\mp(?![A-Za-z])"):
            other = self.product()
            node = ("+", node, other if sign[0] == "+" else ("*", _sign(sign[0]), other))
        return node

    def product(self) -> Node:
        node = self.power()
        while True:
            sign = self.take(r"\*(?!\*)|/|\\(?:cdot|times|div|ast)(?![A-Za-z])")
            if sign:
                minus = self.take("[+-]")
                other = self.power()
                other = ("*", _sign("-"), other) if minus and minus[0] == "-" else other
                node = ("/" if sign[0] in {"/", r"\div"} else "*", node, other)
            elif self.begins_factor():
                node = ("*", node, self.power())
            else:
                return node

    def begins_factor(self) -> bool:
        """Return True if a factor without a sign of multiplication follows; a number never does."""
        sign = self.next()
        if sign == "\\":
            found = COMMAND.match(self.text, self.at)
            name = found[1] if found else ""
            return name in GREEK | BEGINNINGS or name in FUNCTIONS
        after_factorial = self.text[: self.at].rstrip().endswith("!") and sign.isdigit()
        return bool(sign) and (sign.isalpha() or sign in "({" or after_factorial)

    def power(self) -> Node:
        node = self.atom()
        while True:
            if self.take(r"\^\\circ(?![A-Za-z])"):
                node = ("*", node, ("/", ("pi",), ("n", Fraction(180))))
            elif self.take(r"\^|\*\*"):
                node = ("^", node, self.exponent())
            elif self.take(r"!(?!=)"):
                node = ("!", node)
            elif self.take("%"):
                node = ("/", node, ("n", Fraction(100)))
            else:
                return node

    def exponent(self) -> Node:
        minus = self.take("[+-]")
        node = self.number() or self.atom()
        return ("*", _sign("-"), node) if minus and minus[0] == "-" else node

    def argument(self) -> Node:
        r"""Return what `\frac` or `\sqrt` applies to: a group, one digit, a letter or a command."""
        if self.next() == "{":
            return self.atom()
        digit = self.take(r"\d")
        return ("n", Fraction(digit[0])) if digit else self.atom()

    def number(self) -> Node | None:
        if (found := self.take(RECURRING)) or (found := self.take(ENDLESS)):
            return ("n", _recurring(found))
        if found := self.take(SCIENTIFIC):
            digits, power = [part for part in found.groups() if part is not None]
            if abs(int(power)) > LARGEST // 4:
                raise UnreadableError(f"{found[0]} is too large")
            return ("n", Fraction(digits) * Fraction(10) ** int(power))
        if found := (self.take(THOUSANDS) or self.take(DECIMAL)):
            whole = Fraction(re.sub("[, ]", "", found[0]))
            mixed = self.take(r"\\frac\s*\{? ?(\d+) ?\}?\s*\{? ?(\d+) ?\}?|(\d+) ?/ ?(\d+)(?![\d.])")
            if mixed and "." not in found[0]:
                over, under = [int(part) for part in mixed.groups() if part is not None]
                if under == 0:
                    raise UnreadableError("a fraction of zero")
                whole += Fraction(over, under)
            return ("n", whole)
        return None

    def atom(self) -> Node:
        if node := self.number():
            return node
        sign = self.next()
        if sign in CLOSING and sign:
            self.at += 1
            node = self.sum()
            self.need(CLOSING[sign])
            return node
        if sign == "|":
            self.at += 1
            node = self.sum()
            self.need("|")
            return ("abs", node)
        if found := self.take(COMMAND):
            return self.command(found[1])
        if found := LETTERS.match(self.text, self.at):
            return self.letters(found[0])
        raise UnreadableError(f"{self.text!r} is not understood from {self.text[self.at :][:20]!r} on")

    def command(self, name: str) -> Node:
        if name == "frac":
            return ("/", self.argument(), self.argument())
        if name in {"binom", "choose"}:
            return ("binom", self.argument(), self.argument())
        if name == "sqrt":
            return self.root()
        if name in {"lfloor", "lceil", "lvert"}:
            node = self.sum()
            self.need({"lfloor": r"\rfloor", "lceil": r"\rceil", "lvert": r"\rvert"}[name])
            return ({"lfloor": "floor", "lceil": "ceil", "lvert": "abs"}[name], node)
        if name in {"pi", "infty"}:
            return (name,)
        if name in FUNCTIONS:
            return self.function(name)
        if name in {"mathbb", "mathcal", "mathscr", "mathfrak"}:
            self.need("{")
            letter = self.take(r"[A-Za-z]+")
            self.need("}")
            return ("s", f"{name} {letter[0] if letter else ''}{self.index()}")
        if name in {"vec", "hat", "bar", "overline", "tilde", "overrightarrow"}:
            what = self.take(r"\{\s*([A-Za-z]+|\\[a-z]+)\s*\}|([A-Za-z])")
            if not what:
                raise UnreadableError(f"\\{name} of an expression")
            return ("s", f"{name} {what[1] or what[2]}{self.index()}")
        if name in GREEK:
            return ("s", f"{name.removeprefix('var')}{self.index()}")
        raise UnreadableError(f"\\{name} is not understood")

    def root(self) -> Node:
        index: Node = ("n", Fraction(2))
        if self.next() == "[":
            index = self.atom()
        inner = self.number() if self.next().isdigit() else self.argument()
        assert inner is not None
        return ("^", inner, ("/", ("n", Fraction(1)), index))

    def function(self, name: str) -> Node:
        if name == "sqrt":
            return self.root()
        base: Node | None = None
        power: Node | None = None
        for _ in range(2):
            if self.take("_"):
                base = self.argument() if self.next() == "{" else (self.number() or self.argument())
            elif self.take(r"\^(?!\\circ)"):
                power = self.exponent()
        if power == ("*", _sign("-"), ("n", Fraction(1))) and name in INVERSE:
            name, power = INVERSE[name], None
        node: Node = ("f", INVERSE[name] if name.startswith("a") and name in INVERSE else name, self.operand(), base)
        return ("^", node, power) if power else node

    def operand(self) -> Node:
        """Return what a function applies to: a group, or factors up to the next sign or function."""
        if self.next() in {"(", "{", "[", "|"}:
            return self.atom()
        minus = self.take("-")
        node = self.power()
        while self.begins_factor() and not self.begins_function():
            node = ("*", node, self.power())
        return ("*", _sign("-"), node) if minus else node

    def begins_function(self) -> bool:
        found = re.compile(rf"\\?(?:{FUNCTION.pattern})").match(self.text, self.at)
        return found is not None

    def letters(self, run: str) -> Node:
        if found := FUNCTION.match(run):
            self.at += found.end()
            return self.function(found[0])
        if run.startswith("pi") and run not in {"pie"}:
            self.at += 2
            return ("pi",)
        if run in {"oo", "inf", "infinity"}:
            self.at += len(run)
            return ("infty",)
        if len(run) > 3 and not FUNCTION.search(run):
            raise UnreadableError(f"{run!r} is a word")
        self.at += 1
        return ("s", run[0] + self.index() + "".join("'" for _ in iter(lambda: self.take("'"), None)))

    def index(self) -> str:
        found = self.take(r"_\s*(?:\{([^{}]*)\}|([A-Za-z0-9]))")
        return f"_{(found[1] or found[2]).replace(' ', '')}" if found else ""


def _sign(sign: str) -> Node:
    return {"-": ("n", Fraction(-1)), r"\pm": ("pm", 1), r"\mp": ("pm", -1)}[sign]


def _recurring(found: re.Match[str]) -> Fraction:
    groups = [part for part in found.groups() if part is not None]
    head, period = groups[0], "".join(groups[1:])
    whole, _, digits = head.partition(".")
    start = Fraction(int(whole + digits or "0"), 10 ** len(digits))
    return start + Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits))
