"""What every reader of PyTorch tensors offers, and the check of the paths it opens."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from .regions import Region

__all__ = ["TensorReader", "checked_path"]


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
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error
    if not real.is_relative_to(root.resolve()):
        raise CheckpointError(f"{path} points outside its directory, to {real}: copy the file itself there")
    if not real.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    return path


class TensorReader(ABC):
    """The tensors of one or several files, read lazily: names, shapes and dtypes at once, values when they are asked for.

    Attributes:
        files: what was opened, for checksums.
        shapes, dtypes: by name, in the order in which reading is fastest.
        file_names: the file that each tensor is in, by the tensor's name.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.file_names: dict[str, str] = {}
        for file in self.files:
            for name, shape, dtype in self._list(file):
                if name in self.shapes:
                    raise CheckpointError(f"tensor {name} is in both {self.file_names[name]} and {file.name}")
                self.shapes[name], self.dtypes[name], self.file_names[name] = shape, dtype, file.name

    @abstractmethod
    def _list(self, file: Path) -> Iterator[tuple[str, tuple[int, ...], np.dtype]]:
        """Open a file; its tensors' names, shapes and dtypes."""

    @abstractmethod
    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        """A tensor, or a region of it, as an array of its own."""

    def borrow(self, name: str) -> np.ndarray:
        """A whole tensor, valid until the next one is borrowed, so that a reader may reuse its memory."""
        return self.read(name)

    @abstractmethod
    def close(self) -> None:
        """Release files and memory."""
