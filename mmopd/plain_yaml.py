"""Reading YAML that a person wrote: plain values only, bounded in depth and size; errors name the line and a way out.

YAML can say more than settings need, and some of it says another thing than its reader thinks: a key that stands twice,
`0100` for 64, `1:30` for 90, aliases that multiply to gigabytes. All of this is refused. Dates stay texts.
"""

import re
import sys
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode
from yaml.reader import Reader, ReaderError

try:
    from yaml import CSafeLoader as Base
except ImportError:  # PyYAML was built without libyaml
    from yaml import SafeLoader as Base  # type: ignore[assignment]

MAX_DEPTH = 32
MAX_VALUES = 20_000  # aliases written out
MAX_INT = 2**63
MAX_DIGITS = 100  # of a number, leading zeros and places after the point included
TAG = "tag:yaml.org,2002:"
PLAIN = frozenset(f"{TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge"))
SPECIAL = {f"{TAG}bool": "true or false", f"{TAG}null": "nothing"}  # as a key
NOT_DECIMAL = re.compile(r"[-+]?0[0-7_]+|[-+]?[0-9_]+(:[0-9_.]+)+")  # octal, and base 60
HINTS = {  # part of libyaml's or PyYAML's message -> what a person can do
    "cannot start any token": "put quotes around a text that begins with this character",
    "mapping values are not allowed": "put quotes around a text with `: `, and indent keys of one level alike",
    "found undefined alias": "an alias such as `*name` needs its `&name` above it",
    "single document": "remove the line `---` in the middle: a file is one document",
    "for merging": "`<<` takes an alias of a mapping, such as `<<: *name`",
    "escape c": "in double quotes a backslash begins an escape: use single quotes",
    " node, but found": "remove the tag",
}
TAB_HINT = "indent with spaces, not with tabs"
HINT = "look here and in the line before for a bracket or quote that is not closed, and for the indentation"


class YamlError(ValueError):
    """A text is no YAML of plain values; the message begins with the line."""


class Loader(Base):
    """PyYAML's safe loader, for plain values; a derived class can have more tags."""

    tags: ClassVar[frozenset[str]] = PLAIN


Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag in PLAIN]
    for letter, resolvers in Base.yaml_implicit_resolvers.items()
}


def parse(text: str, loader: type[Loader] = Loader, *, lenient: bool = False) -> Any:
    """Return the value of a YAML text; None if it is empty.

    Args:
        text: the text.
        loader: which tags there are.
        lenient: allow a key twice (the last value counts), and keys that are true, false or null: for files of other
            packages.

    Raises:
        YamlError: it is no YAML, or not of plain values; the message names the line.
    """
    try:
        _check_depth(text)
        reader = loader(text)
        node = reader.get_single_node()
        if node is None:
            return None
        _Check(reader, lenient).measure(node)
        return reader.construct_document(node)
    except UnicodeEncodeError as error:
        if sys.getfilesystemencoding() != "utf-8":  # it may be the locale: the command line says so
            raise
        raise YamlError(f"half a character, {error.object[error.start]!a}: write the text in UTF-8") from None
    except ReaderError:
        line = 1 + text.count("\n", 0, found.start() if (found := Reader.NON_PRINTABLE.search(text)) else 0)
        raise YamlError(f"line {line}: a control character: remove it") from None
    except yaml.MarkedYAMLError as error:
        problem = " ".join(f"{error.context or ''} {error.problem}".split())
        hint = next((hint for part, hint in HINTS.items() if part in problem), HINT)
        where = ""
        if mark := error.problem_mark:
            where = f"line {mark.line + 1}, column {mark.column + 1}: "
            if "".join(text.split("\n")[mark.line : mark.line + 1])[mark.column :].startswith("\t"):
                hint = TAB_HINT
        raise YamlError(f"{where}not valid YAML: {problem}: {hint}") from None


def _check_depth(text: str) -> None:
    """Refuse deep nesting before nodes are made, which takes stack: libyaml's composer would end the process."""
    depth = 0
    for event in yaml.parse(text, Loader=Base):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _refusal(event, f"more than {MAX_DEPTH} lists or mappings inside each other: write less")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Check:
    """Measures nodes, each once, and refuses those that are not plain."""

    def __init__(self, reader: Loader, lenient: bool) -> None:
        self.reader = reader
        self.lenient = lenient
        self.known: dict[int, tuple[int, int] | None] = {}  # node -> values and depth; None while it is measured

    def measure(self, node: Node) -> tuple[int, int]:
        """Return how many values a node stands for, and how deep it is.

        Raises:
            YamlError: it contains itself, it is too large or too deep, or a part of it is not plain.
        """
        if id(node) in self.known:
            if (known := self.known[id(node)]) is None:
                raise _refusal(node, "this contains itself by an alias: write it out")
            return known
        self.known[id(node)] = None
        self._check_tag(node)
        parts: list[Node] = []
        if isinstance(node, ScalarNode):
            self._check_scalar(node)
        elif isinstance(node, MappingNode):
            self._check_keys(node)
            parts = [value for _, value in node.value]
        else:
            parts = node.value
        below = [self.measure(part) for part in parts]
        size = 1 + sum(values for values, _ in below), 1 + max((depth for _, depth in below), default=0)
        if size[0] > MAX_VALUES or size[1] > MAX_DEPTH:
            raise _refusal(node, f"aliases make more than {MAX_VALUES:,} values of this, or nest too deep: write less")
        self.known[id(node)] = size
        return size

    def _check_keys(self, node: MappingNode) -> None:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                raise _refusal(key, "a key is a text, not a list or a mapping: put quotes around it")
            self._check_tag(key)
            self._check_scalar(key)
            if key.value in lines and not self.lenient:
                first = lines[key.value]
                raise _refusal(key, f"the key {_short(key.value)!r} stands in line {first} already: remove one of them")
            if key.tag in (f"{TAG}bool", f"{TAG}null") and not self.lenient:
                raise _refusal(key, f"YAML reads the key `{key.value}` as {SPECIAL[key.tag]}: put quotes around it")
            lines[key.value] = key.start_mark.line + 1

    def _check_tag(self, node: Node) -> None:
        if node.tag not in self.reader.tags:
            tag = _short(node.tag.replace(TAG, "!!"))
            raise _refusal(node, f"the tag {tag} has no meaning here: write a plain value, or quotes around a text")

    def _check_scalar(self, node: ScalarNode) -> None:
        shown = _short(node.value)
        if "\0" in node.value:
            raise _refusal(node, "a text with a NUL character: remove it")
        if node.tag not in (f"{TAG}int", f"{TAG}float", f"{TAG}bool"):
            return
        too_large = f"the number {shown} is too large: it may have 64 bits; or put quotes around a text"
        if len(node.value) > MAX_DIGITS:
            raise _refusal(node, too_large)
        try:
            value = self.reader.construct_object(node)
        except (ValueError, KeyError, IndexError):  # of !!int and the like before another text
            kind = node.tag.removeprefix(TAG)
            raise _refusal(node, f"`{shown}` is no {kind}: put quotes around a text") from None
        if isinstance(value, int) and abs(value) >= MAX_INT:
            raise _refusal(node, too_large)
        if NOT_DECIMAL.fullmatch(node.value):
            raise _refusal(node, f"`{shown}` means {value} in YAML: write {value}, or put quotes around a text")


def _refusal(at: Node | yaml.Event, problem: str) -> YamlError:
    return YamlError(f"line {at.start_mark.line + 1 if at.start_mark else 1}: {problem}")


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."
