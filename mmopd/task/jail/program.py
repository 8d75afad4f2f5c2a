"""Runs a program in the process that is confined for it, as judges of programs do."""

import atexit
import builtins
import contextlib
import decimal
import fractions
import functools
import io
import json
import os
import socket
import sys
import threading
import traceback
import types
from typing import Any

Job = dict[str, Any]

PRELOADED = ("cmath", "dataclasses", "queue", "threading")  # imported once instead of in each program, as STARRED is
STARRED = (  # in the order of LiveCodeBench; the modules hide functions of the same names
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json")  # fmt: skip
DEPTH = 50_000  # of recursion, as LiveCodeBench has it
STACK = 128 << 20  # bytes of a thread's stack, at most: some programs ask for as much as all memory
NULL = 4  # the file of /dev/null; file 3 is for the result
STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2, "fd/0": 0, "fd/1": 1, "fd/2": 2, "null": NULL}
DEVICES = {f"/dev/{name}": file for name, file in STREAMS.items()} | {
    f"/proc/self/fd/{file}": file for file in range(3)
}

_file_open, _number_open, _set_stack_size = io.open, os.open, threading.stack_size


def prepare() -> None:
    """Make this interpreter as programs expect it; those that are forked from it inherit that."""
    for name in PRELOADED:
        __import__(name)
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # `site` is not loaded, which defines them
    builtins.open = io.open = _open
    os.open = _os_open  # type: ignore[assignment]
    for name, value in _judges_names().items():
        builtins.__dict__.setdefault(name, value)
    socket.socketpair = _pair  # type: ignore[assignment]
    threading.stack_size = _stack_size
    sys.set_int_max_str_digits(0)
    sys.setrecursionlimit(DEPTH)


def execute(job: Job) -> None:
    """Run the program as a script; then call its function, if one is named, and write the result to file 3 as JSON."""
    module = types.ModuleType("__main__" if job["function"] is None else "program")
    sys.modules["__main__"] = sys.modules[module.__name__] = module
    sys.argv = ["program.py"]
    sys.path.insert(0, "")
    space = module.__dict__
    space["__file__"] = "program.py"
    exec(compile(job["program"], "program.py", "exec"), space)
    if (name := job["function"]) is not None:
        solution = space.get("Solution")
        function = getattr(solution(), name) if callable(solution) and hasattr(solution, name) else space[name]
        text = json.dumps(function(*job["arguments"]), default=_plain).encode()
        while text:
            text = text[os.write(3, text) :]


def _plain(value: Any) -> Any:
    """Return what JSON knows for a result that it does not: a number for a fraction, a list for another iterable."""
    if isinstance(value, decimal.Decimal | fractions.Fraction):
        numerator, denominator = value.as_integer_ratio()
        return numerator if denominator == 1 else float(value)
    return list(value)


def _judges_names() -> dict[str, Any]:
    """Return the names that the judges of TACO, LiveCodeBench and LeetCode import before a program, such as `List`."""
    space: dict[str, Any] = {}
    for name in [*STARRED, "typing"]:
        exec(f"from {name} import *", space)
    for name in STARRED:
        exec(f"import {name}", space)
    return {name: value for name, value in space.items() if not name.startswith("__")}


def _stream(file: Any) -> int | None:
    """Return a copy of a standard stream that is opened by its name, though there is no /dev; None for other files."""
    number = DEVICES.get(os.fspath(file)) if isinstance(file, str | os.PathLike) else None
    return None if number is None else os.dup(number)


def _open(file: Any, *arguments: Any, **settings: Any) -> Any:
    number = _stream(file)
    return _file_open(file if number is None else number, *arguments, **settings)


def _os_open(file: Any, *arguments: Any, **settings: Any) -> int:
    number = _stream(file)
    return _number_open(file, *arguments, **settings) if number is None else number


def _stack_size(size: int = 0) -> int:
    return _set_stack_size(min(size, STACK))


def _pair(*_: object) -> tuple[Any, ...]:
    """Return a pipe instead of two sockets, which programs may not have; asyncio wakes its own loop through it."""
    names: Any = {"fileno": int, "setblocking": os.set_blocking, "recv": os.read, "send": os.write, "close": os.close}
    return tuple(
        types.SimpleNamespace(**{name: functools.partial(call, file) for name, call in names.items()})
        for file in os.pipe()
    )


def end(job: Job) -> None:
    """Run a program and exit as an interpreter does, but without tearing the interpreter down.

    The teardown would take most of the time of a short program.
    """
    status: object = 0
    try:
        try:
            execute(job)
        except SystemExit as error:
            if (status := error.code or 0) and not isinstance(status, int):
                sys.stderr.write(f"{status}\n")
        except BaseException:
            status = 1
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]  # waits for the program's threads
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):  # they may be the program's own, and need its names
            if stream is not None and not getattr(stream, "closed", False):
                stream.flush()
        sys.modules["__main__"].__dict__.clear()  # closes the files that the program left open
        with contextlib.suppress(ValueError):  # it may be closed, or without its buffer
            if sys.__stdout__ is not None:
                sys.__stdout__.flush()
    except BaseException:
        status = 120
    os._exit(status & 255 if isinstance(status, int) else 1)
