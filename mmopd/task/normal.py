r"""The one normaliser of answers: what changes only the look of a text, for all verifiers.

`undressed` removes LaTeX's fonts, escapes and spaces, and writes unicode signs in one way. `normalised` also removes
case and punctuation at the ends. Both are applied to the answer and to the key.
"""

import re
import unicodedata

FONTS = (
    r"text|textbf|textit|textrm|textsf|texttt|textnormal|textup|textsc|emph|underline|mbox|hbox|boldsymbol|bm|pmb|"
    r"mathrm|mathbf|mathit|mathsf|mathtt|mathnormal|operatorname\*?|ensuremath"
)
COLOUR = r"(?:textcolor|colorbox|fcolorbox\s*\{[^{}]*\})\s*(?:\[[^\]{}]*\]\s*)?\{[^{}]*\}"
FONT = re.compile(rf"\\(?:{FONTS}|{COLOUR})\s*\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}")
FONT_OF_A_LETTER = re.compile(rf"\\(?:{FONTS})\s*(?![\\{{])([A-Za-z])(?![A-Za-z])")
SWITCHES = (
    r"(?:displaystyle|textstyle|scriptstyle|bf|rm|it|tt|sf|bfseries|itshape|sffamily|ttfamily|limits|nolimits|tiny|"
    r"scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge)(?![A-Za-z])|color\s*\{[^{}]*\}"
)
SWITCH = re.compile(rf"\\(?:{SWITCHES})\s*")
SWITCHED = re.compile(rf"\{{\s*\\(?:{SWITCHES})\s*([^{{}}]*)\}}")  # `{\bf 5}`
SPACE = re.compile(
    r"\\(?:[ ,;:>]|qquad(?![A-Za-z])|quad(?![A-Za-z])|enspace(?![A-Za-z])|thinspace(?![A-Za-z])|"
    r"[hm]space\*?\s*\{[^{}]*\}|[hv]?phantom\s*\{[^{}]*\})|(?<!\\)~"
)
NOTHING = re.compile(
    r"\\(?:!|(?:left|right|middle|bigl|bigr|Bigl|Bigr|biggl|biggr|big|Big|bigg|Bigg)(?![A-Za-z])\.?)"
    r"|[\u00ad\u200b-\u200f\u2060-\u2064\ufeff\ufe0f]"
)
ESCAPE = re.compile(r"\\([%$&_#{}])")
TICK = re.compile(r"(?<=\S)\s*(?:\\(?:checkmark|square|blacksquare|qed)(?![A-Za-z])|[✓✔✅☑])\s*$")
ACCENT = re.compile(r"""\\(?:(['`^"~])\s*(?:\{\s*\\?([A-Za-z])\s*\}|([A-Za-z]))|c\s*\{([A-Za-z])\})""")
ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308", "~": "\u0303"}
GREEK = re.findall(
    r"\S+",
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Pi Sigma Phi Psi Omega",
)
NAMED = {
    r"\textdollar": "$", r"\texteuro": "€", r"\euro": "€", r"\pounds": "£", r"\textsterling": "£", r"\yen": "¥",
    r"\textyen": "¥", r"\textquotesingle": "'", r"\textasciitilde": "~", r"\textunderscore": "_", r"\textdegree": "°",
    r"\textpercent": "%", r"\textendash": "-", r"\textemdash": "-", r"\textbackslash": "\\", r"\ldots": "...",
    r"\dots": "...", r"\slash": "/", r"\textquoteright": "'", r"\textminus": "-",
    **{f"\\{name}": sign for name, sign in zip(GREEK, "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΠΣΦΨΩ", strict=True)},
}  # fmt: skip
NAME = re.compile("|".join(rf"{re.escape(name)}(?![A-Za-z])(?:\{{\}})?\s?" for name in sorted(NAMED, key=len)[::-1]))
SIGNS = str.maketrans(
    {**dict.fromkeys("−–—‐‑‒―﹣⁻", "-"), **dict.fromkeys("‘’‚′ʼ`´", "'"), **dict.fromkeys("“”„«»″「」『』", '"')}
    | {
        "。": ".",
        "、": ",",
        "，": ",",
        "：": ":",
        "；": ";",
        "？": "?",
        "！": "!",
        "⁄": "/",
        "∶": ":",
        "˚": "°",
        "º": "°",
    }
    | {"·": "·", "∙": "·", "⋅": "·", "•": "·", "✕": "×", "✖": "×", "µ": "μ"}
)
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-", strict=True))
SCRIPTS = re.compile(f"([{''.join(RAISED)}]+)|([{''.join(LOWERED)}]+)")
VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
FRACTION = re.compile(f"(?:(\\d)\\s*)?([{VULGAR}])")
AROUND = re.compile(r"(\$\$?|\\\(|\\\[|\*\*?|__?|`+)(.*?)(\$\$?|\\\)|\\\]|\*\*?|__?|`+)[.。]?", re.DOTALL)
PAIRS = {"$": "$", "$$": "$$", r"\(": r"\)", r"\[": r"\]", **{mark: mark for mark in ("**", "*", "__", "_")}}
ENDS = re.compile(r"""^(?:[ ,;:!?"'`*()\[\]]|\.(?!\d))+|[ .,;:!?"'`*()\[\]]+$""")


def undressed(text: str) -> str:
    r"""Return the text without LaTeX's fonts, escapes and spaces, with ASCII signs and single blanks.

    `\textbf{(B)}\ 12` is `(B) 12`, `5\%` is `5%`, `New\ York` is `New York`, `x²` is `x^2`, `–3` is `-3`, `½` is `1/2`.
    """
    text = unwrapped(signs(without_tick(ACCENT.sub(_accent, text)), fraction=r"{0}/{1}"))
    text = text.replace("{,}", ",").replace("\\\\", " ")
    text = SPACE.sub(" ", NOTHING.sub("", without_switches(text)))
    text = NAME.sub(lambda found: NAMED[re.sub(r"[{}\s]", "", found[0])], text)
    text = ESCAPE.sub(r"\1", without_fonts(text))
    text = re.sub(r"\s*\^\s*\{?\s*\\circ\s*\}?|\s*\\degree(?![A-Za-z])\s?|(?<=\d)\s+°", "°", text)
    text = re.sub(r"\s*(?:\\times(?![A-Za-z])|×)\s*", " × ", re.sub(r"\\cdot(?![A-Za-z])\s?", "·", text))
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"(?<=\w)--+(?=\w)", "-", re.sub(r"(?<=\d)\s+%", "%", text))
    text = text.replace("``", '"').replace("''", '"').replace("**", "")
    return " ".join(unwrapped(text).split())


def normalised(text: str) -> str:
    """Return the text as `undressed` does, in lower case and without punctuation at its ends."""
    return ENDS.sub("", re.sub(r"(?<=[$€£¥]) (?=\d)", "", undressed(text).casefold()))


def signs(text: str, *, fraction: str = r"\frac{{{0}}}{{{1}}}") -> str:
    r"""Return the text in one width (NFKC), with ASCII signs and digits: `x²` becomes `x^{2}`.

    Args:
        fraction: what `½` becomes, from 1 and 2.
    """
    text = SCRIPTS.sub(_script, text)
    text = FRACTION.sub(lambda found: _fraction(found[1], found[2], fraction), text)
    text = unicodedata.normalize("NFKC", text.translate(SIGNS)).translate(SIGNS)
    return "".join(str(unicodedata.decimal(sign)) if sign.isdecimal() and sign > "9" else sign for sign in text)


def without_tick(text: str) -> str:
    """Return the text without a tick after it."""
    bare = TICK.sub("", text)
    return bare if bare == text else bare.rstrip("\\ ")


def without_switches(text: str) -> str:
    r"""Return the text without commands that change font, size or colour of what follows: `{\bf 5}` is `5`."""
    return SWITCH.sub("", SWITCHED.sub(r"\1", text))


def without_fonts(text: str, around: str = "") -> str:
    r"""Return the text with `\text{…}`, `\mathbf{…}` and the like replaced by their contents, from the inside out.

    Args:
        around: what is written before and after the contents.
    """
    for _ in range(8):
        bare = FONT.sub(lambda found: f"{around}{found[1]}{around}", text)
        if bare == text:
            break
        text = bare
    return FONT_OF_A_LETTER.sub(rf"{around}\1{around}", text)


def unwrapped(text: str) -> str:
    r"""Return the text without dollars, `\( \)`, `\[ \]` or asterisks around the whole of it."""
    text = text.strip()
    while (
        (found := AROUND.fullmatch(text)) and PAIRS.get(found[1]) == found[3] and found[2] and found[1] not in found[2]
    ):
        text = found[2].strip()
    return text


def _accent(found: re.Match[str]) -> str:
    mark, *letters = found.groups()
    letter = next(letter for letter in letters if letter)
    return unicodedata.normalize("NFC", letter + (ACCENTS[mark] if mark else "\u0327"))


def _script(found: re.Match[str]) -> str:
    raised, lowered = found[1], found[2]
    inner = "".join(RAISED[sign] for sign in raised) if raised else "".join(LOWERED[sign] for sign in lowered)
    return f"{'^' if raised else '_'}{{{inner}}}"


def _fraction(before: str | None, sign: str, form: str) -> str:
    over, _, under = unicodedata.normalize("NFKC", sign).partition("⁄")
    return f"{before or ''}{' ' if before else ''}{form.format(over, under)}"
