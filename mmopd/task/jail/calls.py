"""Calls of the C library, with errors as exceptions."""

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """Call a function of the C library; raise OSError with its name if it returns a negative number."""
    result: int = getattr(_libc, name)(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def prctl(option: int, value: int | bytes, more: int | bytes = 0) -> None:
    """Change a property of this process."""
    call("prctl", option, value, more, 0, 0)
