r"""The verifier of programs: runs a program against unit tests in the sandbox, and compares the outputs outside of it.

The program cannot see the expected outputs. The answer key is JSON as in Eurus-2-RL-Data, TACO and APPS, in one of two
forms. The first has texts for standard input and the output expected of each; the second has the arguments of a
function and what the function (or `Solution().add`) must return:

    {"inputs": ["1 2\n", ...], "outputs": ["3\n", ...]}
    {"fn_name": "add", "inputs": [[1, 2], ...], "outputs": [3, ...]}

The arguments of a function may also be text with one JSON value per line, with JSON text as its output (LiveCodeBench),
and an output may be a list that holds only the value (APPS). A text may be given as a list of its lines.

`mmopd.task.outputs` compares. Decimal fractions may differ as in PRIME, from which Eurus-2-RL-Data comes; with
`"exact": true` in the key they may not, as in LiveCodeBench.

Whatever the program causes is wrong. Unknown is for the key and for what is missing here: one of `PACKAGES`.
"""

import functools
import json
import re
import textwrap
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmopd.records import UNKNOWN, Outcome
from mmopd.task import outputs as compare
from mmopd.task.response import without_thoughts
from mmopd.task.verify import RIGHT

if TYPE_CHECKING:  # tasks are also loaded by commands that run no program
    from mmopd.task.sandbox import Limits, Run, Sandbox

TOTAL = 45.0  # seconds for all tests of a program
TIMEOUT = 90.0  # seconds, for a task's `timeout`: more than TOTAL, one run and one comparison need
# Nothing is tried twice (`++`): a line of tildes that ends in a backtick took cubic time.
FENCE = re.compile(r"[ \t]*+(?:(?:[-*+]|\d++[.)])[ \t]++)*+(`{3,}+|~{3,}+)[ \t]*+([^\s`]*+)[^`]*+")
PYTHON = frozenset({"python", "python3", "py", "py3"})
# What programs of contests import besides the standard library. A name that is not here may be made up.
PACKAGES = (
    "atcoder|bitarray|gmpy2|more_itertools|mpmath|networkx|numba|numpy|ortools|pandas|pulp|scipy|shapely|sklearn|"
    "sortedcontainers|sympy"
)
MISSING = re.compile(rf"status 1: ModuleNotFoundError: No module named '({PACKAGES})(?:\.[\w.]+)?'")


@dataclass(frozen=True, slots=True)
class Tests:
    """The tests of an answer key."""

    function: str | None
    inputs: list[Any]
    outputs: list[Any]
    exact: bool  # decimal fractions may not differ


@dataclass(frozen=True)
class Programs:
    """The verifier that `verifier` returns."""

    limits: "Limits | None"
    namespaces: bool

    def __call__(self, response: str, answer: str) -> Outcome:
        """Judge the last Python block of a response by the tests of the key."""
        try:
            tests = read_key(answer)
        except (ValueError, RecursionError) as error:
            return Outcome(UNKNOWN, f"the answer key has no tests: {error}")
        source = program(response)
        if source is None:
            return Outcome(0.0, "no program")
        return _judge(source, tests, _sandbox(self.limits, self.namespaces))


def verifier(limits: "Limits | None" = None, *, namespaces: bool = True) -> Programs:
    """Return a task's `verify`: the last Python block of the response must pass every test.

    Args:
        limits: limits of each test; those of `Limits()` by default.
        namespaces: see `Sandbox`; False is the weaker mode, for a machine without namespaces.
    """
    return Programs(limits, namespaces)


def program(response: str) -> str | None:
    """Return the last fenced block marked as Python, or else the last block without a mark; None if there is none.

    A block may be indented, in an item of a list, and fenced by more than three backticks, or by tildes.
    """
    blocks: list[tuple[str, str]] = []
    opened = mark = ""  # fence and mark of the open block; no fence outside of blocks
    body = list[str]()
    for line in without_thoughts(response).split("\n"):
        fence = FENCE.fullmatch(line.rstrip("\r"))
        if fence is None or not fence[1].startswith(opened):
            body.append(line)
        elif not opened or fence[2]:
            opened, mark = fence[1], fence[2].lower().strip("{.}")
            body = []
        else:
            blocks.append((mark, _dedented(body)))
            opened = ""
    python = [text for marked, text in blocks if marked in PYTHON] or [text for marked, text in blocks if not marked]
    return python[-1] if python else None


def _dedented(lines: list[str]) -> str:
    text = "\n".join(lines)
    first = next((line for line in lines if line.strip()), "")
    return textwrap.dedent(text) if first[:1].isspace() else text


def read_key(answer: str) -> Tests:
    """Return the tests of an answer key.

    Raises:
        ValueError: the key has another form, or no test can tell a right program from one that does nothing.
    """
    key = compare.read_json(answer)
    if not isinstance(key, dict):
        raise ValueError("it must be an object with inputs and outputs")
    inputs = key.get("inputs")
    outputs = key.get("outputs")
    function = key.get("fn_name")
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs)):
        raise ValueError("it must have inputs and outputs, the same number of both")
    if function is None:
        inputs = [_text(one) for one in inputs]
        outputs = [_text(one) for one in outputs]
        if not any(output.strip() for output in outputs):
            raise ValueError("no test expects an output")
    elif not isinstance(function, str) or not function.isidentifier():
        raise ValueError(f"fn_name is {function!r}, which is no name of a function")
    else:
        pairs = [_call(given, expected) for given, expected in zip(inputs, outputs, strict=True)]
        inputs = [given for given, _ in pairs]
        outputs = [expected for _, expected in pairs]
        if all(expected in (None, [None]) for expected in outputs):
            raise ValueError("no test expects a value")
    return Tests(function, inputs, outputs, key.get("exact") is True)


@functools.cache
def _sandbox(limits: "Limits | None", namespaces: bool) -> "Sandbox":
    """Return the sandbox of this process, which ends with the process."""
    from mmopd.task.sandbox import Limits, Sandbox

    return Sandbox(limits or Limits(), namespaces=namespaces)


def _judge(source: str, tests: Tests, sandbox: "Sandbox") -> Outcome:
    end = time.monotonic() + TOTAL
    for number, (given, expected) in enumerate(zip(tests.inputs, tests.outputs, strict=True), start=1):
        if tests.function is None:
            run = sandbox.run(source, given)
            passed = compare.same_output(run.output.decode(errors="replace"), expected, exact=tests.exact)
        else:
            run = sandbox.run(source, function=tests.function, arguments=given)
            passed = _returned(run, expected, tests.exact)
        why = (
            run.failure
            or ("" if passed else "another output")
            or ("out of time for all" if time.monotonic() > end else "")
        )
        if number == 1 and (missing := MISSING.fullmatch(run.failure)):
            return Outcome(UNKNOWN, f"no package {missing[1]}: programs have the standard library alone")
        if why:
            return Outcome(0.0, f"test {number} of {len(tests.inputs)}: {why}")
    return RIGHT


def _returned(run: "Run", expected: Any, exact: bool) -> bool:
    try:
        said = compare.read_json(run.result)
    except (ValueError, RecursionError):
        return False
    if isinstance(expected, Wrapped):
        return any(compare.same_value(said, right, exact=exact) for right in (expected.value, [expected.value]))
    return compare.same_value(said, expected, exact=exact)


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A value in a list of one: APPS writes it both for the value and for the list."""

    value: Any


def _call(given: Any, expected: Any) -> tuple[list[Any], Any]:
    if isinstance(given, str):
        return [json.loads(line) for line in given.splitlines() if line.strip()], compare.read_json(expected)
    if not isinstance(given, list):
        raise ValueError(f"the arguments {str(given)[:100]} are not a list")
    return given, Wrapped(expected[0]) if isinstance(expected, list) and len(expected) == 1 else expected


def _text(value: Any) -> str:
    """Return a text of standard input or output, which may be given as a list of its lines; numbers are their text."""
    if isinstance(value, list) and all(_is_line(line) for line in value):
        return "\n".join(map(str, value))
    if not _is_line(value):
        raise ValueError(f"{str(value)[:100]} is neither a text nor a list of lines")
    return str(value)


def _is_line(value: Any) -> bool:
    return isinstance(value, str | int | float | compare.Digits) and not isinstance(value, bool)
