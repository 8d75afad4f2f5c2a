r"""Units after a number: `5 km`, `5\text{ cm}^2`, `3 hours`, `$5`, `5 apples`. Units are equal, or their factors count.

A unit that stands on one side only does not count; two different units must give the same quantity.
"""

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

WORD = r"(?:[A-Za-zμΩ°\u0400-\u04ff\u4e00-\u9fff]+|\^\\circ ?[CFK]?)\.?(?:\^\{?-?\d\}?)?"
NUMBER = r"(?:\d ?(?:thousand|million|billion|trillion)|[\d)\]}!]|\\pi|\\infty)"  # the end of what has a unit
JOIN = r"(?:\s*/\s*|\s+per\s+|\s*\\cdot\s*|\s+)"
UNIT = re.compile(rf"(?P<rest>.*{NUMBER})(?P<gap>\s*)(?P<unit>{WORD}(?:{JOIN}{WORD})*)")
CURRENCY = {"$": "usd", "€": "eur", "£": "gbp", "¥": "yuan", "₹": "rupee", "₽": "ruble", "US$": "usd", "USD": "usd",
            "EUR": "eur", "GBP": "gbp", "Rs": "rupee", "RMB": "yuan", "CNY": "yuan", "R$": "real"}  # fmt: skip
MONEY_BASES = {(name, 1) for name in CURRENCY.values()}
MONEY = re.compile(r"(?P<minus>-?)\s*(?P<sign>US ?\$|R\$|[$€£¥₹₽]|USD|EUR|GBP|RMB|CNY|Rs\.?)\s*(?P<rest>[-\d.].*)")
MONEY_AFTER = re.compile(r"(?P<rest>.*\d)\s*(?P<sign>[$€£¥₹₽])")
SIGN = re.compile(r"(?<=[\d\s])(?:(?P<prefix>[kM]?)\s*\\(?P<name>Omega|ell)\s*$|(?P<micro>\\mu)\s*(?=[A-Za-z]{1,3}$))")
FRACTION = re.compile(rf"(?<=[\d) ])\\frac\s*\{{\s*({WORD})\s*\}}\s*\{{\s*({WORD})\s*\}}$")
TEMPERATURE = re.compile(r"(?:degrees?|deg)\.? (celsius|fahrenheit|[CF])$", re.IGNORECASE)
PART = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)\.?(?:\s*,)?(?:\s*and\b)?\s*")
FEET = re.compile(r"(\d+)\s*'\s*(\d+(?:\.\d+)?)\s*(?:\"|'')")
ARC = re.compile(r"(\d+)\s*\^\\circ\s*(\d+(?:\.\d+)?)\s*'(?:\s*(\d+(?:\.\d+)?)\s*(?:''|\"))?")
EMPTY = frozenset(["unit", "units", "of", "the", "in", "a", "an", "sq", "square", "cubic", "per", "and"])
NOT_UNITS = frozenset(
    re.findall(
        r"\S+",
        "sin cos tan cot sec csc log ln lg exp mod or and not am pm a.m p.m if for where when is are to from than "
        "sqrt pi max with remainder thousand million billion trillion hundred dozen mln mio lakh crore bc ad bce ce "
        "north south east west left right odd even",
    )
)
PREFIXES = {"k": 3, "M": 6, "G": 9, "h": 2, "d": -1, "c": -2, "m": -3, "μ": -6, "n": -9, "p": -12}
LONG = {"kilo": "k", "mega": "M", "giga": "G", "centi": "c", "milli": "m", "micro": "μ", "nano": "n", "deci": "d",
        "hecto": "h"}  # fmt: skip
SI = {
    "m": "metre meter 米 м", "g": "gram gramme gm 克 г", "s": "second sec 秒 с",
    "l": "litre liter L 升 л", "J": "joule joules", "N": "newton newtons", "W": "watt watts", "V": "volt volts",
    "A": "ampere amp amps amperes", "Hz": "hertz", "Pa": "pascal pascals", "Ω": "ohm ohms", "mol": "mole moles",
    "cal": "calorie calories", "C": "coulomb coulombs", "F": "farad", "T": "tesla", "eV": "", "B": "byte bytes",
    "bit": "bits", "K": "kelvin",
}  # fmt: skip
OTHER: dict[str, tuple[str, int | Fraction, str]] = {
    "min": ("s", 60, "minute minutes mins 分钟 分 мин"), "h": ("s", 3600, "hour hours hr hrs 小时 ч"),
    "day": ("s", 86400, "days d 天"), "week": ("s", 604800, "weeks wk wks"), "year": ("year", 1, "years yr yrs"),
    "month": ("year", Fraction(1, 12), "months"), "inch": ("inch", 1, "inches in"), "ft": ("inch", 12, "foot feet"),
    "yd": ("inch", 36, "yard yards yds"), "mile": ("inch", 63360, "miles mi"), "lb": ("lb", 1, "lbs pound pounds"),
    "oz": ("lb", Fraction(1, 16), "ounce ounces"), "ton": ("g", 1000000, "t tonne tonnes tons"),
    "ha": ("m2", 10000, "hectare hectares"), "usd": ("usd", 1, "dollar dollars USD"),
    "cent": ("usd", Fraction(1, 100), "cents ¢"), "eur": ("eur", 1, "euro euros"), "gbp": ("gbp", 1, "GBP"),
    "yuan": ("yuan", 1, "RMB 元"), "yen": ("yen", 1, "JPY"), "rupee": ("rupee", 1, "rupees Rs"),
    "degree": ("angle", 1, "degrees deg 度 ° ^\\circ"), "rad": ("rad", 1, "radian radians"),
    "celsius": ("celsius", 1, "°C ^\\circC ^\\circ\xa0C"), "fahrenheit": ("fahrenheit", 1, "°F ^\\circF"),
    "mph": ("mph", 1, ""), "km": ("m", 1000, "公里 千米 км"), "cm": ("m", Fraction(1, 100), "厘米 см"),
    "mm": ("m", Fraction(1, 1000), "毫米 мм"), "ml": ("l", Fraction(1, 1000), "毫升 мл"),
    "kg": ("g", 1000, "公斤 千克 кг"), "percent": ("%", 1, ""), "atm": ("atm", 1, ""),
    "people": ("people", 1, "person persons"), "child": ("child", 1, "children"),
}  # fmt: skip

SPACES = {"m2": ("m", 2), "l": ("m", 3)}  # a litre is a thousandth of m^3


@dataclass(frozen=True)
class Unit:
    """A unit: its base units with their powers, and its factor to them."""

    bases: frozenset[tuple[str, int]]
    factor: Fraction


def _table() -> dict[str, tuple[str, Fraction]]:
    table: dict[str, tuple[str, Fraction]] = {}
    for unit, names in SI.items():
        for prefix, power in {"": 0, **PREFIXES}.items():
            table[prefix + unit] = unit, Fraction(10) ** power
        for name in names.split():
            table[name] = unit, Fraction(1)
            for prefix, sign in LONG.items():
                table[prefix + name] = unit, Fraction(10) ** PREFIXES[sign]
    for prefix, power in {"": 0, **PREFIXES}.items():
        table[f"{prefix}L"] = "l", Fraction(10) ** power
    for unit, (base, factor, names) in OTHER.items():
        for name in [unit, *names.split(" ")]:
            table[name] = base, Fraction(factor)
    table.pop("", None)
    return table


TABLE = _table()


def split(text: str) -> tuple[str, Unit | None]:
    """Return the text without its unit, and the unit, if it has one."""
    text = FRACTION.sub(_fraction, SIGN.sub(_sign, TEMPERATURE.sub(lambda found: f"°{found[1][0].upper()}", text)))
    if found := MONEY.fullmatch(text):
        rest, inner = split(found["rest"])
        if not (inner and ("%", 1) in inner.bases):
            return found["minus"] + rest, _money(found["sign"])
    if found := MONEY_AFTER.fullmatch(text):
        return found["rest"], _money(found["sign"])
    if found := UNIT.fullmatch(text):
        variable = _is_variable(found["unit"], found["rest"], found["gap"])
        turned = found["unit"].startswith("^") and re.search("sin|cos|tan|cot|sec|csc", found["rest"])
        if not variable and not turned and (unit := parse(found["unit"])) is not None:
            return found["rest"], unit
    return text, None


def _fraction(found: re.Match[str]) -> str:
    known = all(part.partition("^")[0] in TABLE for part in found.groups())
    return f" {found[1]}/{found[2]}" if known else found[0]


def _sign(found: re.Match[str]) -> str:
    return " μ" if found["micro"] else f" {found['prefix']}{'Ω' if found['name'] == 'Omega' else 'L'}"


def compound(text: str) -> tuple[Fraction, Unit] | None:
    """Return `7 hours 30 minutes` as 7.5 and hours; None if the text is not several parts of one quantity."""
    if found := FEET.fullmatch(text):
        text = f"{found[1]} ft {found[2]} inches"
    if found := ARC.fullmatch(text):
        degrees, minutes, seconds = (Fraction(part or 0) for part in found.groups())
        return degrees + minutes / 60 + seconds / 3600, Unit(frozenset({("angle", 1)}), Fraction(1))
    parts = PART.findall(text)
    if len(parts) < 2 or PART.sub("", text) or (first := parse(parts[0][1])) is None:
        return None
    others = [unit for _, name in parts[1:] if (unit := parse(name)) is not None and unit.bases == first.bases]
    factors = [unit.factor for unit in (first, *others)]
    if len(factors) < len(parts) or any(later >= earlier for earlier, later in pairwise(factors)):
        return None
    total = sum(Fraction(number) * factor for (number, _), factor in zip(parts, factors, strict=True))
    return Fraction(total) / first.factor, first


def _is_variable(unit: str, rest: str, gap: str) -> bool:
    """Return True for letters that are more likely a variable: `5m`, `ab` of `3ab`."""
    if re.fullmatch(r"[A-Za-z]", unit):
        return not gap or re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", rest)) is not None
    return not gap and re.fullmatch("[a-z]{2}", unit) is not None and unit not in {"cm", "mm", "km", "kg", "mg", "ml"}


def parse(text: str) -> Unit | None:
    """Return the unit of a text such as `km/h`, `square metres` or `apples`; None if it is none."""
    bases: Counter[str] = Counter()
    factor, sign, power = Fraction(1), 1, 1
    text = re.sub(r"\bkm?p?h\b", "km/h", re.sub(r"\\cdot(?![A-Za-z])", " ", text))
    text = re.sub(r"\^\\circ ?(?=[CFK])", "°", text)
    for part in re.findall(rf"/|{WORD}", text):
        if part in {"/", "per"}:
            sign = -1
            continue
        found = re.fullmatch(r"([^^]+|\^\\circ)\.?(?:\^\{?(-?\d)\}?)?", part)
        if not found:
            return None
        word = found[1].rstrip(".")
        if word.lower() in NOT_UNITS:
            return None
        if word != "A" and word.lower() in EMPTY and not (word == "in" and len(text.split()) == 1):
            power = {"square": 2, "sq": 2, "cubic": 3}.get(word.lower(), power)
            continue
        if (known := _known(word)) is None:
            return None
        of = sign * power * int(found[2] or 1)
        base, many = SPACES.get(known[0], (known[0], 1))
        bases[base] += of * many
        factor *= (known[1] / (1000 if base != known[0] == "l" else 1)) ** of
        power = 1
    return Unit(frozenset((base, n) for base, n in bases.items() if n), factor)


def _known(word: str) -> tuple[str, Fraction] | None:
    one = re.sub(r"(?<=[sxz])es$|(?<=[cs]h)es$|(?<!s)s$", "", word.lower())
    for name in (word, word.lower(), *([one] if len(one) > 2 else [])):
        if name in TABLE:
            return TABLE[name]
    if (len(word) >= 3 and word.isalpha()) or re.fullmatch("[\u4e00-\u9fff]+", word):
        return one, Fraction(1)
    return None


def _money(sign: str) -> Unit:
    return Unit(frozenset({(CURRENCY[sign.replace(" ", "").rstrip(".")], 1)}), Fraction(1))
