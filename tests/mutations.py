"""Mutations of the shipped files, as people, editors and programs make them; used by tests/test_mutated_files.py."""

import json
import random
import re
from collections.abc import Callable, Iterator
from datetime import date
from typing import Any

import yaml

VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 1.5, 10**30, -(10**30), 2**62, float("inf"), float("nan"), 1e300, 5e-324),
    *("", " ", "x", "x" * 5000, "9" * 4000, "nan", "1e400", "0100", "no", "null", "~", "*", "2024-01-01", "é\u202e"),
    *(
        "[/red]",
        r"\[/",
        "[bold]",
        "a\0b",
        "{answer",
        "{0.x}",
        "data/**",
        "x.**",
        "../../../etc/passwd",
        "/",
        ".",
        "a.b",
    ),
    *([], [[]], [None], [1, 2], ["a"], ["a"] * 300, {}, {"a": 1}, {"kind": "x"}, {"kind": ["opd"]}, {"kind": None}),
    *({1: 2}, {True: 1}, {None: 1}, {"": 1}, {"a": {"b": {"c": []}}}, date(2024, 1, 1), b"\xff", {1, 2}, ("a", "b")),
    *("http://[::1", "s3://", "opd", "__init__", "mask", {"shift": {}, "mask": {}}, "x" * 300 + ".yaml"),
]
PIECES = [
    *(
        "[",
        "]",
        "{",
        "}",
        ":",
        ": ",
        "-",
        "- ",
        "?",
        "!",
        "!!",
        "&a ",
        "*a",
        "|",
        ">",
        "%",
        "@",
        "`",
        "#",
        "'",
        '"',
        "\\",
    ),
    *("\t", "\r", "\n", "\0", "\x85", "\u2028", "\ufeff", "\x1b[31m", "é", "，", "---\n", "...\n", "<<: ", "\n\t", "~"),
    *("!!python/object/apply:os.system [x]", "!!int x", "!!timestamp x", "!!bool x", "!!binary x", "!!set {a}", "!x "),
    *("2024-13-45", "0o17", "0x" + "f" * 5000, "9" * 5000, "1:30", "1_000", ".inf", "1e5", "=", "<<", "yes", "on: 1\n"),
    *("{" * 2000, "[" * 2000, "- " * 2000, "{a: " * 50, "&a [*a]", "&a {<<: *a}", "$HOME", "<<: 3\n", "? [a]\n: b\n"),
]
BOMB = "l0: &l0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"l{i}: &l{i} [*l{i - 1}, *l{i - 1}, *l{i - 1}, *l{i - 1}, *l{i - 1}, *l{i - 1}, *l{i - 1}]\n" for i in range(1, 12)
)
CHAIN = "c0: &c0 [1]\n" + "".join(f"c{i}: &c{i} [*c{i - 1}]\n" for i in range(1, 200))


class FileLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads task files, too, in which functions have names."""


_Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
FileLoader.add_constructor("!function", lambda loader, node: str(node.value))


def mutated(text: str, dice: random.Random) -> bytes:
    """Return the text with one mutation, sometimes with two."""
    once = dice.choice([*WAYS, _of_values, _of_values])(text, dice)
    if dice.random() < 0.2:
        return dice.choice(WAYS)(once.decode("utf-8", "replace"), dice)
    return once


def override(text: str, dice: random.Random) -> str:
    """Return a `key=value` of the command line for a key of the file, or for something like one."""
    key = dice.choice([".".join(map(str, path)) for path in paths(yaml.load(text, FileLoader))])
    key = dice.choice([key, key, key, key[:-1], f"{key}.x", f".{key}", f"{key}.", "", "x", key.replace(".", "..")])
    value = dice.choice([dice.choice(PIECES), json.dumps(dice.choice(VALUES), default=str), "{a: 1", "\ud800"])
    return dice.choice([f"{key}={value}", f"{key}={value}", f"{key}={value}", key, f"{key}={value}={value}"])


def paths(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Iterate over the places of all values inside a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inside:
        yield (*above, key)
        yield from paths(below, (*above, key))


def _of_values(text: str, dice: random.Random) -> bytes:
    """Replace, remove or rename one value."""
    data = yaml.load(text, FileLoader)
    *above, last = dice.choice(list(paths(data))) if isinstance(data, dict) and data else [None]
    inside = data
    for key in above:
        inside = inside[key]
    how = dice.randrange(5)
    if last is None:
        data = dice.choice(VALUES)
    elif how == 0:
        del inside[last]
    elif how == 1 and isinstance(inside, dict):
        name = dice.choice([str(last)[1:], f"{last}s", str(last).upper(), "", 1, True, None, "<<", "kind", "x" * 300])
        inside[name] = inside.pop(last)
    else:
        inside[last] = dice.choice(VALUES)
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True).encode("utf-8")


def _of_lines(text: str, dice: random.Random) -> bytes:
    """Remove, repeat, move or indent one line."""
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("#")] or [text]
    i, j = dice.randrange(len(lines)), dice.randrange(len(lines))
    ways: list[Callable[[], Any]] = [
        lambda: lines.pop(i),
        lambda: lines.insert(j, lines[i]),
        lambda: lines.insert(i, f" {lines.pop(i)}"),
        lambda: lines.insert(i, f"\t{lines.pop(i)}"),
        lambda: lines.insert(i, lines.pop(i).strip() + "\n"),
        lambda: lines.insert(j, lines.pop(i)),
    ]
    dice.choice(ways)()
    return "".join(lines).encode("utf-8")


def _of_characters(text: str, dice: random.Random) -> bytes:
    """Insert a piece, or remove some characters, at a place after the first comment."""
    start = next((found.start() for found in re.finditer(r"^[^#\n]", text, re.MULTILINE)), 0)
    at = dice.randrange(start, len(text) + 1)
    return (text[:at] + dice.choice([dice.choice(PIECES), ""]) + text[at + dice.choice([0, 0, 1, 3]) :]).encode("utf-8")


def _of_bytes(text: str, dice: random.Random) -> bytes:
    """Write in another encoding, flip a bit, or cut the file off."""
    data = text.encode("utf-8")
    at = dice.randrange(len(data)) if data else 0
    return dice.choice(
        [
            data[:at],
            data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :],
            text.encode("utf-16"),
            (text + "# é\n").encode("latin-1", "replace"),
            b"\xef\xbb\xbf" + data,
            data.replace(b"\n", b"\r\n"),
            data + b"\0",
            b"\x1f\x8b\x08\0" + data,
            b"",
        ]
    )


def _of_the_whole(text: str, dice: random.Random) -> bytes:
    """Put it into something else, or add what grows."""
    return dice.choice(
        [text + BOMB, CHAIN + text, f"{text}---\n{text}", text + text, f"- {text}", "# nothing\n"]
    ).encode()


WAYS = [_of_lines, _of_characters, _of_characters, _of_bytes, _of_the_whole]
