"""Models in object stores: which objects a checkpoint needs, and their local copy. Imports no jax."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from .errors import CheckpointError
from .staging import INCOMPLETE, MARKERS, local_copy, reading
from .storage import Entry, StorePath

__all__ = ["COMMIT", "steps_of", "stored_file", "stored_model"]

# With it orbax says that a step of a training run is complete.
COMMIT = "_CHECKPOINT_METADATA"
_STEPS = "checkpoints"
_SMALL = (".json", ".txt", ".jinja")
_RESULTS = ("model", "adapter", "tensorboard")  # directories of a training run beside its steps


def stored_model(path: StorePath, *, small: bool = False) -> Path:
    """A local copy of a checkpoint, as long as this process lives.

    Args:
        path: of a checkpoint, of one safetensors file with its config.json beside it, of a training run, of which the newest
            complete step is taken, or of one of its steps.
        small: everything but the weights.

    Returns:
        The directory or file that stands for it.

    Raises:
        MissingFileError: there is nothing.
        CheckpointError: it is not complete, or the store denies access.
        ChangedError, DownloadError, UnreachableError: as `local_copy` raises them.
    """
    if path.name.isdecimal() and path.parent.name == _STEPS:
        run, step = path.parent.parent, int(path.name)
        return local_copy(run, partial(_of_model, run, small, step)) / _STEPS / path.name
    if path.suffix and path.key:
        with reading(path):
            alone = path.is_file()
        if alone:
            return stored_file(path)
    return local_copy(path, partial(_of_model, path, small, None))


def stored_file(path: StorePath) -> Path:
    """A local copy of one object, with the small ones beside it. Raises as `stored_model` does."""
    beside = lambda entry: "/" not in entry.name and entry.name.endswith(_SMALL)
    return local_copy(path.parent, lambda found: [e for e in found if e.name == path.name or beside(e)]) / path.name


def steps_of(names: Sequence[str]) -> list[int]:
    """The complete steps of a training run, ascending, by the names of its objects."""
    found = (name.split("/") for name in names if name.startswith(f"{_STEPS}/"))
    return sorted(int(parts[1]) for parts in found if parts[1].isdecimal() and parts[2:] == [COMMIT])


def _of_model(path: StorePath, small: bool, step: int | None, entries: Sequence[Entry]) -> list[Entry]:
    """The objects of a checkpoint among all those below a place."""
    names = {entry.name for entry in entries}
    if INCOMPLETE in names and not names.intersection(MARKERS):
        raise CheckpointError(
            f"{path} is incomplete: it is being written, or what wrote it was killed; then write it again, as before"
        )
    if small:
        return [entry for entry in entries if "/" not in entry.name and entry.name.endswith(_SMALL)]
    steps = [step] if step is not None else steps_of(sorted(names))[-1:]
    if "run.json" in names or step is not None:
        above = (_STEPS, *_RESULTS)
        own = lambda name: name.partition("/")[0] not in above or any(name.startswith(f"{_STEPS}/{n}/") for n in steps)
        return [entry for entry in entries if own(entry.name)]
    tensors = {str(PurePosixPath(name).parent) for name in names if name.endswith(".safetensors")}
    pickled = lambda name: name.endswith(".bin") and str(PurePosixPath(name).parent) in tensors
    return [entry for entry in entries if entry.name != INCOMPLETE and not pickled(entry.name)]
