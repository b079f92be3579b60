"""Where a chat template runs: harmless ones here, the others in a child process with limits on memory and time.

A template that is not harmless by its form (sandbox.py) may still be harmless: most use variables or macros. In the child it
renders as here, a fraction of a millisecond later; if it asks for more than the limits, the child ends and the caller gets a
PromptError.
"""

import atexit
import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ..child import AVAILABLE, Child, parent
from ..errors import PromptError
from . import sandbox

__all__ = ["LimitError", "render", "serve", "variables_of", "written"]

# Limits of a child: address space in bytes; processor time of one answer in seconds, and on top of it a generous time by the
# clock, which counts where the machine is busy or the template sleeps.
_MEMORY = 3 * 2**29
_SECONDS = 1.0
_PATIENCE = 60.0
# Characters of a prompt, beside four times what the template was given.
_LONGEST_PROMPT = 10_000_000
# Characters that a harmless template may go over if it runs in this process: a second at most.
_HERE = 20_000_000


class LimitError(PromptError):
    """A template asked for more memory or time than it may have."""


# Errors of a child whose kind matters to its parent.
_KINDS: dict[str, type[PromptError]] = {kind.__name__: kind for kind in (LimitError, sandbox.InvalidError)}
_lock = threading.Lock()
_children: dict[int, Child] = {}  # by process id, since a fork must not use its parent's child


@functools.lru_cache(maxsize=64)
def variables_of(template: str) -> frozenset[str]:
    """The names that a template takes from outside. Raises PromptError where it is not valid jinja."""
    if _trusted(template, 0):
        return sandbox.variables_of(template)
    return frozenset(_ask("variables_of", template))


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes.

    Args:
        template: jinja text.
        variables: JSON values by name.

    Raises:
        PromptError: the template is not valid, fails, or exceeds a limit.
    """
    size = _size(variables)
    longest = _LONGEST_PROMPT + 4 * size
    if _trusted(template, size):
        return sandbox.run(template, variables, longest)
    return _ask("run", template, dict(variables), longest)


def written(template: str, probes: list[dict[str, Any]]) -> list[str]:
    """Texts that a template writes: those that stand in it, and what it makes of some variables, unless it refuses them.

    Args:
        template: jinja text.
        probes: JSON values by name, several times.

    Raises:
        PromptError: the template is not valid, or exceeds a limit with all of these together.
    """
    size = _size(probes)
    if _trusted(template, size):
        return sandbox.written(template, probes, _LONGEST_PROMPT)
    return _ask("written", template, probes, _LONGEST_PROMPT)


def _trusted(template: str, size: int) -> bool:
    # An expression of ten characters writes all of the conversation once.
    return (sandbox.harmless(template) and (size + 1000) * (len(template) // 10 + 1) <= _HERE) or not AVAILABLE


def _size(value: Any) -> int:
    """Roughly the characters in a JSON value."""
    size, waiting = 0, [value]
    while waiting:
        found = waiting.pop()
        if type(found) is str:
            size += len(found)
        elif type(found) is dict:
            size += sum(map(len, found))
            waiting += found.values()
        elif type(found) is list:
            waiting += found
        size += 8
    return size


def _ask(*request: Any) -> Any:
    with _lock:
        child = _children.get(os.getpid())
        if child is None or not child.alive():
            try:
                child = _children[os.getpid()] = Child(__name__, quiet=True).begin(None)
            except (OSError, EOFError) as fault:
                raise PromptError(f"it needs a child process, which does not start: {fault}") from fault
        try:
            child.send(request, _PATIENCE)
            value, error, kind = child.receive(_PATIENCE)
        except BaseException as fault:  # an interrupt as well leaves an unread answer behind
            _children.pop(os.getpid(), None)
            slow, gone = isinstance(fault, TimeoutError), isinstance(fault, (OSError, EOFError))
            code = child.exit_code() if gone and not slow else 0
            child.end()
            if slow or code == -signal.SIGPROF:
                raise LimitError(f"it takes more than {_SECONDS:g} seconds of processor time") from None
            if gone:
                raise LimitError(f"it takes more than {_MEMORY / 2**30:.1f} GiB of memory, or is nested too deeply") from None
            raise
    if error is not None:
        raise _KINDS.get(kind, PromptError)(error)
    return value


@atexit.register
def end_children() -> None:
    """End this process's child."""
    child = _children.pop(os.getpid(), None)
    if child is not None:
        child.end()


def serve() -> None:
    """In the child: answer requests with (value, None, None) or (None, error, kind) until the parent is gone."""
    import resource

    channel = parent()
    with contextlib.suppress(ValueError, OSError):  # a system without this limit, or with a lower one already
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    channel.receive()
    sandbox.harmless("")  # imports jinja
    channel.send(None)
    work: dict[str, Callable[..., Any]] = {"run": sandbox.run, "written": sandbox.written}
    work["variables_of"] = lambda template: sorted(sandbox.variables_of(template))
    for name, template, *rest in channel.messages():
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)  # its signal ends a process, whatever C code it is in
        try:
            answer: Any = work[name](template, *rest), None, None
        except PromptError as error:
            answer = None, str(error), type(error).__name__
        except MemoryError:
            answer = None, f"it takes more than {_MEMORY / 2**30:.1f} GiB of memory", LimitError.__name__
        signal.setitimer(signal.ITIMER_PROF, 0)
        channel.send(answer)
        del answer, rest
