"""What every reader of PyTorch tensors offers, and the checks of the paths it opens and the names it finds."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import CheckpointError, MissingFileError
from .regions import Region

__all__ = ["TensorReader", "check_names", "checked_path", "plain_name"]

_MAX_NAME = 1000
# What wrappers of a module put into the names of its parameters: torch.compile, DistributedDataParallel, FSDP, checkpointing.
# PEFT's `base_model.model` stands in front only: inside, `model` is a name of ours.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PEFT = "base_model.model."


def plain_name(name: str) -> str:
    """A tensor's name without what wrappers of the model put into it, in whatever order they were nested."""
    name = _WRAPPERS.sub("", name)
    while name.startswith(_PEFT):
        name = name.removeprefix(_PEFT)
    return name


def check_names(file: Path, names: Iterable[str]) -> None:
    """Raise CheckpointError for a name, of a tensor or a file, that no program gives: unprintable, or endless."""
    for name in names:
        if not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
            raise CheckpointError(f"{file} has a name that is none: {name[:80]!r}")


def checked_path(directory: Path, name: str) -> Path:
    """`directory / name`, which must be a file that, with symbolic links followed, lies inside the directory.

    A snapshot of the Hub's cache consists of links into the `blobs` folder beside it, so there the file must lie inside the
    folder of the repository. Raises CheckpointError.
    """
    path = directory / name
    root = directory
    if directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--"):
        root = directory.parent.parent
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        kind = MissingFileError if isinstance(error, FileNotFoundError) else CheckpointError
        hint = ""
        if name == "config.json" and directory.is_dir() and not any(directory.iterdir()):
            hint = ": the directory is empty; download the whole repository into it, or name another"
        elif name == "config.json":
            hint = ": pass --config FILE (config=…), or download the whole repository"
        raise kind(f"cannot open {path}: {getattr(error, 'strerror', None) or error}{hint}") from error
    if not real.is_relative_to(root.resolve()):
        raise CheckpointError(f"{path} points outside its directory, to {real}: copy the file itself there")
    if not real.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    return path


class TensorReader(ABC):
    """The tensors of one or several files, read lazily: names, shapes and dtypes at once, values when they are asked for.

    Attributes:
        files: what was opened, for checksums.
        shapes, dtypes: by name (see `plain_name`), in the order in which reading is fastest.
        file_names: the file that each tensor is in, by the tensor's name.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.file_names: dict[str, str] = {}
        try:
            for file in self.files:
                for name, shape, dtype in self._list(file):
                    self._add(file, name, tuple(shape), dtype)
        except BaseException:
            self.close()
            raise

    def _add(self, file: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        check_names(file, [name])
        if name in self.shapes:
            where = self.file_names[name]
            fault = (
                f"is in both {where} and {file.name}" if where != file.name else f"occurs twice in {where}, with two prefixes"
            )
            raise CheckpointError(f"tensor {name} {fault}")
        self.shapes[name], self.dtypes[name], self.file_names[name] = shape, dtype, file.name

    @abstractmethod
    def _list(self, file: Path) -> Iterator[tuple[str, tuple[int, ...], np.dtype]]:
        """Open a file; its tensors' plain names, shapes and dtypes."""

    @abstractmethod
    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """A tensor, or a region of it, as an array of its own."""

    def borrow(self, name: str) -> np.ndarray:
        """A whole tensor, valid until the next one is borrowed, so that a reader may reuse its memory."""
        return self.read(name)

    @abstractmethod
    def close(self) -> None:
        """Release files and memory."""
