r"""Writes LaTeX, plain text and unicode signs in one way, for `forms` and `expression`."""

import re
import unicodedata

from mmopd.task import expression, normal
from mmopd.task.expression import UnreadableError

COMMANDS = {
    r"[dtc]?frac|nicefrac|sfrac": "frac", r"[dt]binom": "binom", r"leqslant|leqq|leq|le": "le",
    r"geqslant|geqq|geq|ge": "ge",
    r"neq|ne": "ne", r"lt": "lt", r"gt": "gt", r"thickapprox|approx|approxeq|simeq|doteq|fallingdotseq": "approx",
    r"varnothing|emptyset": "emptyset", r"lbrace": "{", r"rbrace": "}", r"lbrack": "[", r"rbrack": "]", r"lparen": "(",
    r"rparen": ")", r"vert|mid|lvert|rvert": "|", r"land|wedge": "and", r"lor|vee": "or", r"colon": ":", r"ast": "*",
    r"degree|textdegree": "^\\circ", r"rightarrow|longrightarrow|to": "to", r"leftarrow|gets": "gets",
    r"bigtriangleup|triangle": "triangle", r"R|reals|Reals": "mathbb{R}", r"textminus": "-",
    r"overline|bar": "overline", r"infin|infty": "infty", r"dots|ldots|cdots": "ldots",
    r"Longrightarrow|Rightarrow|implies|therefore|because": "", r"mathbf": "",
}  # fmt: skip
SIGNS = {
    "×": r"\times ", "·": r"\cdot ", "÷": "/", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≦": r"\le ",
    "≧": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≃": r"\approx ", "≅": r"\approx ", "π": r"\pi ", "∞": r"\infty ",
    "°": r"^\circ ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ", "∓": r"\mp ", "∅": r"\emptyset ", "Ø": r"\emptyset ",
    "≡": r"\equiv ", "⟨": r"\langle ", "⟩": r"\rangle ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}", "∖": r"\setminus ", "∧": " and ", "∨": " or ", "≪": r"\ll ", "−": "-", "⋯": r"\ldots ",
    "△": r"\triangle ", "▵": r"\triangle ", "∠": r"\angle ", "∡": r"\angle ", "→": r"\to ", "⇒": r"\to ",
    "←": r"\gets ", "↑": r"\uparrow ", "↓": r"\downarrow ", "⊥": r"\perp ", "∥": r"\parallel ",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∣": "|",
}  # fmt: skip
ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?)")
ROW = "\u240a"  # instead of `\\\\`, which ends a row of a matrix
OPEN, CLOSE = "([{", ")]}"
DERIVATIVE = re.compile(
    r"^(?:\\frac\s*\{\s*d\s*([a-zA-Z])\s*\}\s*\{\s*d\s*[a-zA-Z]\s*\}|d([a-z])\s*/\s*d[a-z])(?=\s*=[^=]*$)"
)
CHOOSE = re.compile(r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}")
OVER = re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}")
COMBINATIONS = re.compile(
    r"C\s*_\s*\{?\s*(\d+)\s*\}?\s*\^\s*\{?\s*(\d+)\s*\}?|(?:\{\s*\})?[\^_]\s*\{?\s*(\d+)\s*\}?\s*C\s*_\s*\{?\s*(\d+)\s*\}?"
    r"|(?<![A-Za-z])n?C\(\s*(\d+)\s*,\s*(\d+)\s*\)"
)
FRENCH = re.compile(r"([\[\]])\s*([^\[\],;]+[,;][^\[\],;]+)([\[\]])")  # ]2, 5[
SEPARATED = re.compile(
    r"(?<![\w.,'])(?:\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?|\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:'\d{3})+(?:\.\d+)?)(?![\w,']|\.\d)"
)
INDIAN = re.compile(r"(?<![\w.,'])\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?(?![\w,']|\.\d)")
PREFIX = re.compile(r"^(?:so|thus|hence|therefore)?,?\s*(?:the )?(?:final |correct )?answer(?: is|:| =)\s*:?\s*", re.I)
MINUS = re.compile(r"^(?:minus|negative)\s+(?=[\d.\\])", re.I)
ORDINAL = re.compile(r"^(\d+)\s*\^?\s*\{?\s*(?:st|nd|rd|th)\s*\}?$")
BASED = re.compile(r"^([0-9A-Fa-f]+)\s*\(?\s*(?:in )?base\s*\{?\s*(\w+)\s*\}?\s*\)?$")


def prepared(text: str) -> str:
    """Return the text as `forms.form` and `expression.read` take it: one spelling of each sign and command."""
    text = normal.unwrapped(normal.without_tick(text.strip()))
    text = ROOT.sub(r"\\sqrt{\1}", text)
    text = (
        normal.signs("".join(SIGNS.get(sign, sign) for sign in text)).replace("√", r"\sqrt ").replace("∛", r"\sqrt[3]")
    )
    text = re.sub(r"\\\\(?:\[[^\]]*\])?", ROW, text).strip(f" {ROW}")
    text = re.sub(r"(?<=\d)\{,\}(?=(?:\d{1,2}|\d{4,})(?!\d))", ".", text).replace("{,}", ",")  # 12{,}5 is 12.5
    if not re.search(r"\d~\d(?!\d\d)", text):
        text = re.sub(r"(\d)\s*(?:\\[,;: ]|~)\s*(?=\d{3}(?!\d))", r"\1 ", text)
    text = normal.SPACE.sub(" ", normal.NOTHING.sub("", normal.without_switches(text)))
    text = re.sub(r"\\(?:textdollar|\$)", "$", text).replace(r"\%", "%").replace(r"\#", "#").replace(r"\&", "&")
    text = normal.without_fonts(text, " ").replace(r"\_", "_")
    text = _commands(text)
    text = text if r"\begin" in text else text.replace("&", " and ")
    text = re.sub(r"(?<=\d)\s*\^\s*(?:o|\{\s*o\s*\})(?![A-Za-z])", r"^\\circ ", text)
    text = re.sub(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])", r"^\\circ ", text)
    text = re.sub(r"\^\s*\{?((?:\s*\\prime(?![A-Za-z]))+)\s*\}?", lambda found: "'" * found[1].count("prime"), text)
    text = re.sub(r"\s+(?=[\^_])", "", re.sub(r"(?<!\\)\{\s*([^\w{}\\]?)\s*\}", r"\1", text))
    text = normal.unwrapped(" ".join(text.split()))
    text = re.sub(r"[α-ωΑ-Ω]", _greek, text)
    text = re.sub(r"(?<=[\w)\]}%$!])\s*\.$", "", text.strip(" ,;")).strip()
    text = MINUS.sub("-", ORDINAL.sub(r"\1", BASED.sub(r"\1_{\2}", PREFIX.sub("", text))))
    return _older_forms(re.sub(r"\bper cent\b", "percent", text))


def _commands(text: str) -> str:
    for names, name in COMMANDS.items():
        plain = name if not name[:1].isalpha() or name in {"and", "or"} else f"\\{name}"
        plain = f" {plain} " if name in {"and", "or"} else plain
        plain = f"{plain} " if plain[-1:].isalpha() else plain
        text = re.sub(rf"\\(?:{names})(?![A-Za-z])\s?", plain.replace("\\", r"\\"), text)
    text = text.replace("->", r"\to ").replace(":=", "=")
    return "".join(SIGNS.get(sign, sign) for sign in text)


def _older_forms(text: str) -> str:
    r"""Return the text with `\frac` for `\over`, `\binom` for other signs of it, and `[2,5)` for the French `[2,5[`."""
    for pattern, name in ((OVER, "frac"), (CHOOSE, "binom")):
        text = pattern.sub(rf"\\{name}{{\1}}{{\2}}", text)
        if text.count(f"\\{'over' if name == 'frac' else 'choose'}") == 1:
            text = pattern.sub(rf"\\{name}{{\1}}{{\2}}", f"{{{text}}}")
    text = DERIVATIVE.sub(lambda found: f"{found[1] or found[2]}'", text)
    text = COMBINATIONS.sub(_combination, text)
    return text if r"\sqrt[" in text else FRENCH.sub(_interval, text)


def _combination(found: re.Match[str]) -> str:
    a, b = (int(part) for part in found.groups() if part is not None)
    return rf"\binom{{{a}}}{{{b}}}" if a >= b else found[0]


def _interval(found: re.Match[str]) -> str:
    first, inner, last = found.groups()
    if (first, last) == ("[", "]"):
        return found[0]
    return f"{'(' if first == ']' else '['}{inner}{')' if last == '[' else ']'}"


def ungrouped(text: str) -> str:
    """Return one number without the thousands separators of other countries: `1.234.567,8` is `1234567.8`."""
    if re.search(r"[(\[{]", text):
        return text
    text = SEPARATED.sub(lambda found: _plain(found[0]), text)
    return INDIAN.sub(lambda found: found[0].replace(",", ""), text)


def _plain(number: str) -> str:
    return number.replace("'", "") if "'" in number else number.replace(".", "").replace(",", ".")


def _greek(found: re.Match[str]) -> str:
    name = unicodedata.name(found[0]).rpartition(" ")[2]
    name = {"LAMDA": "lambda"}.get(name, name.lower())
    return f"\\{name.capitalize() if found[0].isupper() else name} "


def compact(text: str) -> str:
    """Return a prepared text without needless braces, and without blanks except between digits."""
    text = re.sub(r"\\(?=[{}])", "", text)
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", re.sub(r"(?<!\d)\s+|\s+(?!\d)|\\ ", "", text)).strip("$.")


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


def items(text: str) -> list[str]:
    """Return the parts between commas; inside of brackets every comma separates."""
    parts, start, depth = list[str](), 0, 0
    for at, sign in enumerate(text):
        depth += (sign in OPEN) - (sign in CLOSE)
        if depth == 0 and sign in ",;":
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def rows(text: str) -> list[str]:
    """Return the rows of a matrix or of `cases`."""
    return text.strip().strip(ROW).split(ROW)
