"""`pytorch_model*.bin`: pickles, and therefore programs. Their opcodes are checked first, and only a pickle of plain tensors is
given to torch's own weights-only loader, which maps the file instead of reading it."""

import pickletools
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import CheckpointError
from .readers import TensorReader
from .regions import Region

__all__ = ["BinReader"]

# Everything a saved state dict refers to. Any other name in a pickle is something that it would run.
_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
_ALLOWED = {
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"),
    *(f"torch {kind}Storage" for kind in _STORAGES),
    "torch.storage UntypedStorage",
}
_MAX_PICKLE = 100_000_000


def check_pickle(path: Path) -> None:
    """Raise CheckpointError unless the pickle in a file only rebuilds tensors. Nothing is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [item for item in archive.infolist() if item.filename.endswith(".pkl")]
            if len(members) != 1 or not members[0].filename.endswith("data.pkl") or members[0].file_size > _MAX_PICKLE:
                raise CheckpointError(f"{path} is refused: not the archive that torch.save writes")
            text = archive.read(members[0])
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is refused: not the zip archive that torch.save has written since torch 1.6 ({error}); "
            "bare pickles are never opened"
        ) from error
    try:
        for opcode, argument, _ in pickletools.genops(text):
            if opcode.name in ("GLOBAL", "INST"):
                named = str(argument)
            elif opcode.name == "STACK_GLOBAL":
                named = "a name computed on the stack"  # torch.save, which writes protocol 2, never needs one
            elif opcode.name.startswith("EXT"):
                named = f"extension {argument}"
            else:
                continue
            if named not in _ALLOWED:
                raise CheckpointError(f"{path} is refused: its pickle would run {named.replace(' ', '.')}, which is no tensor")
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is refused: its pickle is damaged ({error})") from error


class BinReader(TensorReader):
    """Tensors of `pytorch_model*.bin`, mapped into memory by torch."""

    def __init__(self, files: Sequence[Path]):
        self._tensors: dict[str, Any] = {}
        super().__init__(files)

    def _list(self, file: Path) -> Iterator[tuple[str, tuple[int, ...], np.dtype]]:
        check_pickle(file)
        try:
            import torch
        except ImportError as error:
            raise CheckpointError(
                f"{file} is a pickle, which only torch's weights-only loader may open, and torch is not installed. "
                "Install it (pip install torch), or re-save the checkpoint as safetensors"
            ) from error
        kinds = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{file} is refused by torch's weights-only loader: {reason}") from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{file} holds a {type(state).__name__}, not a mapping from names to tensors")
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise CheckpointError(f"{file} holds {name!r}: {type(tensor).__name__}, which is no tensor")
            if tensor.dtype not in kinds:
                raise CheckpointError(f"{file}: {name} has dtype {tensor.dtype}, which no weight of these models has")
            self._tensors[name] = tensor.detach()
            yield name, tuple(tensor.shape), np.dtype(kinds[tensor.dtype])

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        return np.array(self.borrow(name)[... if region is None else region])

    def borrow(self, name: str) -> np.ndarray:
        import torch

        # numpy has no bfloat16 of its own: the bits travel as int16
        tensor, dtype = self._tensors[name], self.dtypes[name]
        return tensor.contiguous().view(torch.int16).numpy().view(dtype) if dtype.itemsize == 2 else tensor.numpy()

    def close(self) -> None:
        self._tensors = {}
