"""Values of expressions: exact where they are rational, otherwise 60 digits, at points if there are variables."""

from collections.abc import Callable
from fractions import Fraction
from functools import cache, partial
from math import comb, factorial
from typing import Any

from mmopd.task.expression import LARGEST, Node

HIGHEST = 10**9  # bits of a number's exponent
DIGITS, MORE_DIGITS = 60, 400
CLOSE, ROUNDED = 40, Fraction(10_000_001, 10**13)  # digits that must agree; relative error of a rounded decimal: 1e-6


class UndefinedError(ArithmeticError):
    """The expression has no value here, or none that can be computed in bounded time."""


def symbols(node: Node) -> set[str]:
    """Return the names of the variables; `e` and `i` are numbers."""
    if node[0] == "s":
        return set() if node[1] in {"e", "i"} else {node[1]}
    return set().union(*(symbols(part) for part in node[1:] if isinstance(part, tuple)))


def has(node: Node, what: Node) -> bool:
    """Return True if a part of the expression begins with `what`."""
    return node[: len(what)] == what or any(has(part, what) for part in node[1:] if isinstance(part, tuple))


def exact(node: Node) -> Fraction | None:
    """Return the value of a rational expression; None if it is not rational, or too large."""
    kind, *parts = node
    if kind == "n":
        return Fraction(parts[0])
    if kind not in {"+", "*", "/", "^", "!", "binom", "abs"}:
        return None
    values = [exact(part) for part in parts]
    if any(value is None or _bits(value) > LARGEST for value in values):
        return None
    a, b = [*(value for value in values if value is not None), Fraction(0)][:2]
    if kind == "+":
        return a + b
    if kind == "*":
        return a * b
    if kind == "abs":
        return abs(a)
    if kind == "/":
        return a / b if b else None
    return _integers(kind, a, b)


def _integers(kind: str, a: Fraction, b: Fraction) -> Fraction | None:
    if kind == "^":
        fits = b.denominator == 1 and abs(b) * max(_bits(a), 1) <= LARGEST and (a or b > 0)
        return Fraction(a ** int(b)) if fits else None
    if a.denominator != 1 or not 0 <= a <= 1500 or b.denominator != 1 or not 0 <= b <= 1500:
        return None
    return Fraction(factorial(int(a)) if kind == "!" else comb(int(a), int(b)))


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


@cache
def _context(digits: int) -> Any:
    from mpmath import MPContext  # takes a tenth of a second, and most tasks do not need it

    context = MPContext()
    context.dps = digits
    return context


def number(node: Node, point: dict[str, Fraction], sign: int = 1, digits: int = DIGITS) -> Any:
    """Return the value at a point, as a number of mpmath.

    Args:
        point: values of the variables; where there are any, roots and logarithms of negative numbers are undefined.
        sign: value of ±.

    Raises:
        UndefinedError: it has no value, or a value out of all bounds.
    """
    mp = _context(digits)
    value = _value(mp, node, point, sign)
    if mp.isnan(value):
        raise UndefinedError
    return value


def _value(mp: Any, node: Node, point: dict[str, Fraction], sign: int) -> Any:
    kind, *parts = node
    if kind == "n":
        return mp.mpf(parts[0].numerator) / parts[0].denominator
    if kind == "pm":
        return mp.mpf(parts[0] * sign)
    if kind == "pi":
        return +mp.pi
    if kind == "infty":
        return mp.inf
    if kind == "s":
        if (name := parts[0]) in point:
            return mp.mpf(point[name].numerator) / point[name].denominator
        return {"e": +mp.e, "i": mp.mpc(0, 1)}[name]
    if kind == "f":
        x, base = (_value(mp, part, point, sign) if part else None for part in parts[1:])
        return _call(mp, parts[0], x, base, bool(point))
    values = [_value(mp, part, point, sign) for part in parts]
    try:
        return _operation(mp, kind, values, bool(point))
    except (ZeroDivisionError, ValueError, OverflowError):
        raise UndefinedError from None


def _operation(mp: Any, kind: str, values: list[Any], real: bool) -> Any:
    a, b = [*values, None][:2]
    if kind == "+":
        return a + b
    if kind == "*":
        return a * b
    if kind == "/":
        return a / b
    if kind == "abs":
        return abs(a)
    if kind in {"floor", "ceil"}:
        return mp.floor(a) if kind == "floor" else mp.ceil(a)
    if abs(a) > 10**6 and kind in {"!", "binom"}:
        raise UndefinedError
    if kind == "!":
        return mp.factorial(a)
    if kind == "binom":
        return mp.binomial(a, b)
    if a != 0 and mp.isfinite(a) and mp.isfinite(b) and abs(b) * max(abs(mp.log(abs(a), 2)), 1) > HIGHEST:
        raise UndefinedError
    if real and not isinstance(a, mp.mpc) and a < 0 and b != mp.floor(mp.re(b)):
        raise UndefinedError
    return mp.power(a, b)


def _call(mp: Any, name: str, x: Any, base: Any, real: bool) -> Any:
    try:
        if abs(x) > 10**9 and name not in {"ln", "lg", "log"} and mp.isfinite(x):
            raise UndefinedError
        if name in {"ln", "lg", "log"}:
            if real and not isinstance(x, mp.mpc) and x < 0:
                raise UndefinedError
            return mp.log(x) / (mp.log(base) if base is not None else mp.log(10) if name == "lg" else 1)
        names = {"arcsin": "asin", "arccos": "acos", "arctan": "atan", "arccot": "acot"}
        return getattr(mp, names.get(name, name))(x)
    except (ZeroDivisionError, ValueError, OverflowError):
        raise UndefinedError from None


def equal(ours: Node, theirs: Node, *, sign: int = 1, rounded: bool = False) -> bool:
    """Return True if both expressions have the same value, at every point where both have one.

    Args:
        sign: value of ± in `ours`.
        rounded: one of them is a decimal fraction, which may be a rounded irrational or recurring number.
    """
    names = sorted(symbols(ours) | symbols(theirs))
    a, b = (None, None) if names else (exact(ours), exact(theirs))
    if a is not None and b is not None:
        return a == b or (rounded and not _both_end(a, b) and abs(a - b) <= ROUNDED * abs(b))
    agreed = 0
    for point in points(names):
        at = partial(_both, ours, theirs, point, sign)
        try:
            x, y = at(DIGITS)
        except UndefinedError:
            continue
        if not _same(x, y, rounded and not names, at):
            return False
        agreed += 1
    return agreed >= min(3, len(points(names)))


def _both(ours: Node, theirs: Node, point: dict[str, Fraction], sign: int, digits: int) -> tuple[Any, Any]:
    return number(ours, point, sign, digits), number(theirs, point, 1, digits)


def _same(x: Any, y: Any, rounded: bool, again: Callable[[int], tuple[Any, Any]]) -> bool:
    mp = _context(DIGITS)
    if x == y:
        return True
    if not (mp.isfinite(x) and mp.isfinite(y)):
        return False
    size = max(abs(x), abs(y))
    if rounded and abs(x - y) <= mp.mpf(10) ** -6 * size:
        return True
    if size > mp.mpf(10) ** -CLOSE:
        return bool(abs(x - y) <= mp.mpf(10) ** -CLOSE * size)
    x, y = again(MORE_DIGITS)  # zero, or only small?
    mp = _context(MORE_DIGITS)
    size = max(abs(x), abs(y))
    return bool(size < mp.mpf(10) ** -(MORE_DIGITS - CLOSE) or abs(x - y) <= mp.mpf(10) ** -CLOSE * size)


def close(ours: Node, theirs: Node, share: Fraction) -> bool:
    """Return True if two constants differ by at most that share of the larger one; True for expressions."""
    if symbols(ours) | symbols(theirs):
        return True
    try:
        x, y = number(ours, {}), number(theirs, {})
    except UndefinedError:
        return False
    return bool(abs(x - y) <= abs(x) * share.numerator / share.denominator)


def nearby(value: Any) -> Fraction | None:
    """Return the simple fraction that a number is up to the digits that count; None if there is none."""
    mp = _context(DIGITS)
    if not mp.isfinite(value) or abs(mp.im(value)) > mp.mpf(10) ** -CLOSE or abs(value) > 10**9:
        return None
    real = mp.re(value)
    found = Fraction(int(mp.nint(real * mp.mpf(10) ** 40)), 10**40).limit_denominator(10**9)
    return found if found and abs(mp.mpf(found.numerator) / found.denominator - real) <= mp.mpf(10) ** -30 else None


def _both_end(a: Fraction, b: Fraction) -> bool:
    """Return True if both are decimal fractions that end, so that neither needs rounding."""
    return all(_ends(value) for value in (a, b))


def _ends(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71)


def points(names: list[str]) -> list[dict[str, Fraction]]:
    """Return the points at which expressions are compared: integers, fractions, and negative fractions."""
    if not names:
        return [{}]
    if len(names) > len(PRIMES) - 6:
        return []
    values = [[Fraction(PRIMES[(i + k) % len(PRIMES)]) for i in range(len(names))] for k in range(4)]
    values += [
        [Fraction(PRIMES[(3 * i + k) % len(PRIMES)], 7 + 2 * k + i) for i in range(len(names))] for k in range(4)
    ]
    values += [[-value for value in point] for point in values[4:]]
    return [dict(zip(names, point, strict=True)) for point in values]
