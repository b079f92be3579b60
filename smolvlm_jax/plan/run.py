"""`plan`: ask the compilers in a child process. Imports no jax."""

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..child import AVAILABLE, Child
from ..errors import InputError, JobError, SmolVLMError
from .figures import Plan
from .settings import PlanConfig
from .target import parse_target

__all__ = ["plan"]


class _Refused(SmolVLMError, RuntimeError):
    """What the child says is wrong, with its exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # of this one error, not of the class


def plan(config: PlanConfig, notify: Callable[[str, int, int], None] = lambda name, number, total: None) -> Plan:
    """What a model needs on chips, which need not be there.

    Args:
        config: the question.
        notify: told the name of each program before it is compiled, which may take minutes, its number and how many there are.

    Returns:
        Memory of a chip, the cost of each program, and the rate of records.

    Raises:
        InputError: an unknown chip, settings that contradict each other.
        SmolVLMError: what the child found: a model that does not fit, a compiler that is not installed.
        JobError: the compiler ended without an answer.
    """
    on = (_topology(config) or "here") if config.on is None else config.on
    parse_target(on)
    if not AVAILABLE:
        raise InputError("plan needs a system with process groups and sockets between processes, such as Linux or macOS")
    with _dump_directory() as dump:
        return _ask((config, on, dump), notify)


def _ask(question: tuple[PlanConfig, str, str], notify: Callable[[str, int, int], None]) -> Plan:
    """What the child answers to a question."""
    child = Child("smolvlm_jax.plan.worker", quiet=True).begin(question)
    try:
        for kind, *answer in child.messages():
            if kind == "program":
                notify(*answer)
            elif kind == "error":
                raise _Refused(*answer)
            else:
                return answer[0]
        raise JobError(f"the compiler ended without an answer (exit code {child.exit_code()})")
    finally:
        child.end()


@contextmanager
def _dump_directory() -> Iterator[str]:
    """A directory for what the compilers dump, which may be gigabytes: gone when the block ends, and also when the child or
    this process is killed. A process of its own removes it once this one has closed its pipe, in whatever way it ended."""
    dump = tempfile.mkdtemp(prefix="smolvlm-plan-")
    # Again until nothing is left: a compiler that is being killed may still write.
    script = 'cat; until rm -rf -- "$1"; do sleep 1; done'
    command, nowhere = ["sh", "-c", script, "sh", dump], subprocess.DEVNULL
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True):
        yield dump


def _topology(config: PlanConfig) -> str | None:
    """The chips that a recipe names."""
    if config.recipe is None:
        return None
    from ..train.recipes import load_recipe

    found = load_recipe(config.recipe, config.overrides).topology
    if found is None:
        raise InputError(
            f"the recipe {config.recipe} names no topology: add --on v5e:2x4, say, or --on here for this machine's devices"
        )
    return found
