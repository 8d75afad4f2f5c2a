r"""The verifier of programs: runs a program against unit tests in the sandbox, and compares the outputs outside of it.

The program cannot see the expected outputs. The answer key is JSON as in Eurus-2-RL-Data, TACO and APPS, in one of two
forms. The first has texts for standard input and the output expected of each; the second has the arguments of a
function and what the function (or `Solution().add`) must return:

    {"inputs": ["1 2\n", ...], "outputs": ["3\n", ...]}
    {"fn_name": "add", "inputs": [[1, 2], ...], "outputs": [3, ...]}

The arguments of a function may also be text with one JSON value per line, with JSON text as its output (LiveCodeBench),
and an output may be a list that holds only the value (APPS). A text may be given as a list of its lines.
"""

import functools
import json
import math
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmopd.records import UNKNOWN, Outcome
from mmopd.task.base import Verify
from mmopd.task.verify import RIGHT, without_thoughts

if TYPE_CHECKING:  # tasks are also loaded by commands that run no program
    from mmopd.task.sandbox import Limits, Run, Sandbox

TOTAL = 45.0  # seconds for all tests of a program
TIMEOUT = 60.0  # seconds, for a task's `timeout`: longer than TOTAL, so that the sandbox decides before the pool
TOLERANCE = 1e-6
FENCE = re.compile(r"[ \t]*```[ \t]*([^\s`]*)[^`]*")
PYTHON = frozenset({"python", "python3", "py", "py3"})
DECIMAL = re.compile(r"[+-]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][+-]?\d+)?")
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Tests:
    """The tests of an answer key."""

    function: str | None
    inputs: list[Any]
    outputs: list[Any]


def verifier(limits: "Limits | None" = None, *, namespaces: bool = True) -> Verify:
    """Return a task's `verify`: the last Python block of the response must pass every test.

    Args:
        limits: limits of each test; those of `Limits()` by default.
        namespaces: see `Sandbox`; False is the weaker mode, for a machine without namespaces.
    """

    def verify(response: str, answer: str) -> Outcome:
        try:
            tests = read_key(answer)
        except ValueError as error:
            return Outcome(UNKNOWN, f"the answer key has no tests: {error}")
        source = program(response)
        if source is None:
            return Outcome(0.0, "no program")
        return _judge(source, tests, _sandbox(limits, namespaces))

    return verify


def program(response: str) -> str | None:
    """Return the last fenced block marked as Python, or else the last block without a mark; None if there is none."""
    blocks: list[tuple[str, str]] = []
    mark = None  # mark of the open block; None outside of blocks
    body = list[str]()
    for line in without_thoughts(response).split("\n"):
        fence = FENCE.fullmatch(line)
        if fence is None:
            body.append(line)
        elif mark is None or fence[1]:
            mark = fence[1].lower()
            body = []
        else:
            blocks.append((mark, "\n".join(body)))
            mark = None
    python = [text for marked, text in blocks if marked in PYTHON] or [text for marked, text in blocks if not marked]
    return python[-1] if python else None


def read_key(answer: str) -> Tests:
    """Return the tests of an answer key.

    Raises:
        ValueError: the key has another form, or no test can tell a right program from one that does nothing.
    """
    key = json.loads(answer)
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
    else:
        pairs = [_call(given, expected) for given, expected in zip(inputs, outputs, strict=True)]
        inputs = [given for given, _ in pairs]
        outputs = [expected for _, expected in pairs]
        if not isinstance(function, str) or all(expected in (None, [None]) for expected in outputs):
            raise ValueError("no test expects a value")
    return Tests(function, inputs, outputs)


def same_output(said: str, expected: str) -> bool:
    """Compare two outputs line by line and word by word.

    Empty lines and blanks do not count, and decimal fractions may differ by 1e-6.
    """
    lines = [[line.split() for line in text.splitlines() if line.strip()] for text in (said, expected)]
    return len(lines[0]) == len(lines[1]) and all(
        len(ours) == len(theirs) and all(map(_same_word, ours, theirs)) for ours, theirs in zip(*lines, strict=True)
    )


def same_value(said: Any, expected: Any) -> bool:
    """Compare two JSON values; fractions may differ by 1e-6, and true is not 1."""
    if isinstance(said, bool) or isinstance(expected, bool):
        return said is expected
    if isinstance(said, float) or isinstance(expected, float):
        return isinstance(said, int | float) and isinstance(expected, int | float) and _near(said, expected)
    if isinstance(said, list) and isinstance(expected, list):
        return len(said) == len(expected) and all(map(same_value, said, expected))
    if isinstance(said, dict) and isinstance(expected, dict):
        return said.keys() == expected.keys() and all(same_value(said[key], expected[key]) for key in said)
    return type(said) is type(expected) and bool(said == expected)


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
            passed = same_output(run.output.decode(errors="replace"), expected)
        else:
            run = sandbox.run(source, function=tests.function, arguments=given)
            passed = _returned(run, expected)
        why = (
            run.failure
            or ("" if passed else "another output")
            or ("out of time for all" if time.monotonic() > end else "")
        )
        if why:
            return Outcome(0.0, f"test {number} of {len(tests.inputs)}: {why}")
    return RIGHT


def _returned(run: "Run", expected: Any) -> bool:
    try:
        said = json.loads(run.result)
    except (ValueError, RecursionError):
        return False
    if isinstance(expected, Wrapped):
        return same_value(said, expected.value) or same_value(said, [expected.value])
    return same_value(said, expected)


@dataclass(frozen=True, slots=True)
class Wrapped:
    """A value in a list of one: APPS writes it both for the value and for the list."""

    value: Any


def _call(given: Any, expected: Any) -> tuple[list[Any], Any]:
    if isinstance(given, str):
        return [json.loads(line) for line in given.splitlines() if line.strip()], json.loads(expected)
    if not isinstance(given, list):
        raise ValueError(f"the arguments {str(given)[:100]} are not a list")
    return given, Wrapped(expected[0]) if isinstance(expected, list) and len(expected) == 1 else expected


def _text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:100]} is neither a text nor a list of lines")
    return value


def _same_word(said: str, expected: str) -> bool:
    if said == expected:
        return True
    return bool(DECIMAL.fullmatch(expected) and NUMBER.fullmatch(said)) and _near(float(said), float(expected))


def _near(said: float, expected: float) -> bool:
    return math.isclose(said, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
