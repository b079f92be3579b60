"""The steps of a run on the disk: which are complete, and what is done with the others."""

from collections.abc import Mapping
from pathlib import Path

from ..convert.file_sums import damaged_files
from ..errors import CheckpointError
from ..io import read_json
from ..storage import AnyPath
from ..terminal import say
from .bounds import STEP

__all__ = ["newest_step", "rename_aside", "set_aside"]

_COMMIT = "_CHECKPOINT_METADATA"  # orbax's note of when a step was complete
_SMALL = 1 << 20  # bytes; larger files of steps that are not restored are compared by their size only
_NOTES = ("data/metadata", "metrics/metrics")  # JSON that orbax reads, of every step and without a check


def _steps(directory: Path) -> list[Path]:
    """The entries of a directory that are named like a step, complete or not, the newest first."""
    found = directory.iterdir() if directory.is_dir() else []
    return sorted((path for path in found if path.name.isdecimal()), key=lambda path: int(path.name), reverse=True)


def newest_step(directory: Path) -> int | None:
    """The number of the newest entry of a directory that is named like a step; None if there is none."""
    return next((int(path.name) for path in _steps(directory)), None)


def _fault(step: Path, largest: int | None) -> str | None:
    """What is wrong with a step, None if nothing is known to be."""
    if step.name != str(int(step.name)) or int(step.name) > STEP[1]:
        return "no step has this name"
    if not step.is_dir():
        return "it is no directory"
    try:
        committed = read_json(step / _COMMIT).get("commit_timestamp_nsecs")
        problems = damaged_files(step, largest)
        if problems is None:
            problems = []
            for note in _NOTES:
                read_json(step / note, missing_ok=True)
    except CheckpointError as error:
        return str(error)
    if not isinstance(committed, int) or not 0 < committed < 2**63:
        return "it was never completed"
    return None if not problems else problems[0] + (f", and {len(problems) - 1} more" if problems[1:] else "")


def set_aside(directory: Path, shown: AnyPath) -> None:
    """Rename the steps that are damaged, so that the newest whole one is the newest, and say so. shown: the directory's name.

    All files of the steps are read, from the newest back to a complete one; of older ones only the small files.

    Raises:
        CheckpointError: there are steps, and none of them is whole, or the directory is none. Nothing is renamed then.
    """
    if not directory.is_dir() and (directory.exists() or directory.is_symlink()):
        raise CheckpointError(f"{directory} is no directory, where the checkpoints of the run belong: move it away")
    faults: dict[str, str] = {}
    whole = None
    for step in _steps(directory):
        fault = _fault(step, None if whole is None else _SMALL)
        if fault is not None:
            faults[step.name] = fault
        elif whole is None:
            whole = int(step.name)
    if faults and whole is None:
        newest, fault = next(iter(faults.items()))
        raise CheckpointError(
            f"no checkpoint under {shown} is whole (step {newest}: {fault}): remove the directory to start anew"
        )
    if whole is not None:
        rename_aside(directory, faults, whole, shown)


def rename_aside(directory: Path, faults: Mapping[str, str], whole: int, shown: AnyPath) -> None:
    """Rename damaged steps, and say what is wrong with each and which is the newest whole one. shown: the directory's name."""
    for name, fault in faults.items():
        path = directory / name
        aside = next(
            other
            for n in range(10_000)
            if not (other := path.with_name(f"{name}.damaged" + f"-{n}" * (n > 0))).exists() and not other.is_symlink()
        )
        path.rename(aside)
        say(
            f"the checkpoint of step {name} is damaged ({fault}): it is now {shown / aside.name}, the newest "
            f"whole one is of step {whole}"
        )
