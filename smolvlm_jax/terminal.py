"""What a command says, whatever its standard streams lead to.

A stream may be closed, absent (`sys.stderr` is None in a daemon), on a full disk, or a pipe whose reader has gone. A remark
that cannot be read costs no work and changes no exit code. Imports nothing of this package.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["columns", "draw", "on_terminal", "said_at", "say", "show", "standard_streams", "table"]

_NAMES = ("stdin", "stdout", "stderr")  # by descriptor
_BROKEN = (OSError, ValueError)  # what a stream raises that cannot be written; ValueError: it is closed
_COLUMNS = 80
_lock = threading.RLock()  # of what follows
_drawn = False  # whether the line of `draw` stands on the terminal
_said = 0.0  # when something was said last


def say(message: str) -> None:
    """Print a line for the person at the terminal."""
    _print(sys.stderr, f"smolvlm-jax: {message}")


def show(text: str) -> None:
    """Print what a command has found that stands in its files as well."""
    _print(sys.stdout, text)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns as text: names, and what is said of each."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:{width}}  {text}".rstrip() for name, text in rows)


def draw(text: str) -> None:
    """Show a line on the terminal in place of the one that was drawn before, until something is said; "" takes it away."""
    global _drawn
    with _lock:
        if sys.stderr is None or not (text or _drawn):
            return
        with suppress(*_BROKEN):
            sys.stderr.write(f"\r{text[: columns() - 1]}\x1b[K")
            sys.stderr.flush()
        _drawn = bool(text)


def columns() -> int:
    """How many columns the terminal at standard error has; 80 where it is none, or does not know."""
    with suppress(*_BROKEN, AttributeError):
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    return _COLUMNS


def said_at() -> float:
    """When the last line was said, by the monotonic clock; 0 before the first."""
    return _said


def _print(stream: Any, text: str) -> None:
    global _said
    if stream is None:  # would mean standard output to print()
        return
    with _lock, suppress(*_BROKEN):
        draw("")
        _said = time.monotonic()
        print(text, file=stream, flush=True)


def on_terminal() -> bool:
    """Whether somebody watches standard error, so that progress may be shown there."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except _BROKEN:
        return False


@contextmanager
def standard_streams() -> Iterator[None]:
    """Within the block all three standard streams are there; what is missing is the null device.

    A closed descriptor would be given to the next file that is opened, which would then receive what C libraries write to
    standard error. When the block ends, streams that cannot be written are turned off: the interpreter would complain of them,
    and change the exit code.
    """
    for descriptor in range(len(_NAMES)):
        try:
            os.fstat(descriptor)
        except OSError:
            # It gets the lowest free number, which is this one. Children are to have it too.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    replaced = {}
    for name in _NAMES:
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            replaced[name] = stream
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode, errors="backslashreplace"))  # noqa: SIM115 (open as long as the block)
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # whatever an answer holds, and whatever the locale can write
    try:
        yield
    finally:
        for name in ("stdout", "stderr"):
            _turn_off_if_broken(getattr(sys, name))
        for name, stream in replaced.items():
            getattr(sys, name).close()
            setattr(sys, name, stream)


def _turn_off_if_broken(stream: Any) -> None:
    try:
        stream.flush()
    except _BROKEN:
        with suppress(*_BROKEN):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
