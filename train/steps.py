"""The steps of a run on the disk: which are whole, and what becomes of those that are not."""

from collections.abc import Mapping
from pathlib import Path

from ..convert.file_sums import damaged_files
from ..errors import CheckpointError
from ..io import read_json
from ..terminal import say

__all__ = ["rename_aside", "set_aside"]

_COMMIT = "_CHECKPOINT_METADATA"  # orbax's note of when a step was complete
_SMALL = 1 << 20  # bytes; larger files of steps that are not restored are compared by their size only


def _steps(directory: Path) -> list[int]:
    """The numbers of the steps in a directory, whole or not, the newest first."""
    found = directory.iterdir() if directory.is_dir() else []
    return sorted((int(path.name) for path in found if path.name.isdecimal() and path.is_dir()), reverse=True)


def _fault(step: Path, largest: int | None) -> str | None:
    """What is wrong with a step, None if nothing is known to be."""
    try:
        if not read_json(step / _COMMIT).get("commit_timestamp_nsecs"):
            return "it was never completed"
    except CheckpointError as error:
        return str(error)
    problems = damaged_files(step, largest)
    return None if not problems else problems[0] + (f", and {len(problems) - 1} more" if problems[1:] else "")


def set_aside(directory: Path) -> None:
    """Rename the steps that are damaged, so that the newest whole one is the newest, and say so.

    Everything of the steps is read, from the newest back to one that is whole; of older ones what is small.

    Raises:
        CheckpointError: there are steps, and none of them is whole. Nothing is renamed then.
    """
    faults, whole = {}, None
    for step in _steps(directory):
        fault = _fault(directory / str(step), None if whole is None else _SMALL)
        if fault is not None:
            faults[step] = fault
        elif whole is None:
            whole = step
    if faults and whole is None:
        newest = max(faults)
        raise CheckpointError(
            f"no checkpoint under {directory} is whole (step {newest}: {faults[newest]}): remove the directory to start anew"
        )
    if whole is not None:
        rename_aside(directory, faults, whole)


def rename_aside(directory: Path, faults: Mapping[int, str], whole: int) -> None:
    """Rename damaged steps, and say what is wrong with each and which is the newest whole one."""
    for step, fault in faults.items():
        path = directory / str(step)
        aside = next(
            name for n in range(10_000) if not (name := path.with_name(f"{step}.damaged" + f"-{n}" * (n > 0))).exists()
        )
        path.rename(aside)
        say(f"the checkpoint of step {step} is damaged ({fault}): it is now {aside}, the newest whole one is of step {whole}")
