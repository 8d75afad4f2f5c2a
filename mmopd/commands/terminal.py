"""Output of commands: spelled out in the encoding of the terminal, and a quiet end if nobody reads it."""

import codecs
import io
import os
import signal
import sys

from rich.console import Console

SPELLED_OUT = "mmopd.spelled-out"  # name of the error handler
SIGNS = {"…": "...", "✓": "+", "✗": "x", "–": "-", "±": "+-", "→": "->", "≥": ">=", "≤": "<=", "Δ": "change of"}
NOBODY_READS = 128 + signal.SIGPIPE  # exit status, as of a program that the signal ended


def set_up() -> None:
    """Prepare the output of this process; called once, by the command line."""
    codecs.register_error(SPELLED_OUT, _spell_out)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=SPELLED_OUT)
    Console.on_broken_pipe = _end  # type: ignore  # also of the consoles that typer makes


def _spell_out(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return what is written in place of a letter that the encoding lacks, and the place of the next letter."""
    assert isinstance(error, UnicodeEncodeError)
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":  # a byte of a file name that Python could not decode
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return SIGNS.get(letter, ascii(letter)[1:-1]), error.start + 1


def _end(console: Console) -> None:
    """End the process: the reader of the pipe has gone, as `head` does."""
    console.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), console.file.fileno())  # Python writes the rest of its buffer at the end
    raise SystemExit(NOBODY_READS)
