"""`pytorch_model*.bin`: zip archives of a pickle, which says what the tensors are, and a member for the values of each storage.

Read here, without torch: every number of the pickle is checked against the archive before a value is read, and every member
that is read against its CRC, as it streams past.
"""

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import CheckpointError
from .readers import TensorReader, plain_name
from .regions import Region
from .safetensors_file import DTYPES
from .torch_pickle import MAX_PICKLE, SavedTensor, WouldRun, read_state

__all__ = ["BinReader"]

_KNOWN = {dtype.name: dtype for dtype in DTYPES.values()}
_PIECE = 1 << 20  # bytes read at a time where they are only checked
# What zipfile and zlib raise for damage.
_FAULTS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, RuntimeError, OverflowError)
_LOCAL_HEADER = 30  # bytes, before the member's name and extra fields
# Weights hardly compress. What a file announces beyond this is a trap: repeated views, or zeros that inflate.
_EXPANSION, _ALLOWANCE = 16, 16 << 20


class _Archive:
    """One file: its members, and those whose CRC has been found right."""

    def __init__(self, path: Path):
        self.path = path
        self.file: IO[bytes] = open(path, "rb")  # noqa: SIM115  closed with the reader
        try:
            self.zip = zipfile.ZipFile(self.file)
            self.members = {item.filename: item for item in self.zip.infolist()}
            pickles = [name for name in self.members if name.endswith(".pkl")]
            if len(pickles) != 1 or not pickles[0].endswith("data.pkl") or len(self.members) != len(self.zip.infolist()):
                raise CheckpointError(f"{path} is refused: not the archive that torch.save writes")
            self.root = pickles[0].removesuffix("data.pkl")
            self.pickle = self._small(pickles[0], MAX_PICKLE)
            order = f"{self.root}byteorder"
            if order in self.members and self._small(order, 100).strip() != b"little":
                raise CheckpointError(f"{path} is refused: its values are not in little-endian order")
        except CheckpointError:
            self.file.close()
            raise
        except _FAULTS as error:
            self.file.close()
            raise CheckpointError(
                f"{path} is refused: not the zip archive that torch.save has written since torch 1.6, or damaged ({error}); "
                "bare pickles are never opened"
            ) from error
        self._whole: set[str] = set()

    def _small(self, name: str, limit: int) -> bytes:
        item = self.members[name]
        if item.file_size > limit:
            raise CheckpointError(f"{self.path} is refused: {name} announces {item.file_size:,} bytes, the limit is {limit:,}")
        with self.zip.open(item) as data:
            found = data.read(limit + 1)
        if len(found) != item.file_size:
            raise zipfile.BadZipFile(f"{name} has {len(found):,} bytes, not {item.file_size:,}")
        return found

    def member(self, key: str) -> zipfile.ZipInfo | None:
        return self.members.get(f"{self.root}data/{key}")

    def read(self, item: zipfile.ZipInfo, start: int, out: memoryview) -> None:
        """Fill `out` with the member's bytes from `start` on; the CRC of the whole member is right then."""
        try:
            if item.compress_type == zipfile.ZIP_DEFLATED:
                self._inflate(item, start, out)
                return
            if item.compress_type != zipfile.ZIP_STORED:
                raise zipfile.BadZipFile(f"its compression, number {item.compress_type}, is not supported")
            if item.compress_size != item.file_size:
                raise zipfile.BadZipFile("it is stored as it is, and has two sizes")
            begin = self._begin(item)
            if (start, len(out)) == (0, item.file_size):
                crc = self._fill(begin, out)
            else:
                crc = self._crc(item, begin)
                self._fill(begin + start, out)
            if crc != item.CRC:
                raise zipfile.BadZipFile("its CRC is wrong")
            self._whole.add(item.filename)
        except _FAULTS as error:
            raise CheckpointError(f"{self.path} is damaged: {item.filename}: {error}") from error

    def _begin(self, item: zipfile.ZipInfo) -> int:
        """Where the values of a member that is stored as it is begin."""
        with self.zip.open(item):  # checks the local header against the directory
            pass
        self.file.seek(item.header_offset)
        header = self.file.read(_LOCAL_HEADER)
        name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        return item.header_offset + _LOCAL_HEADER + name + extra

    def _fill(self, begin: int, out: memoryview) -> int:
        """Read bytes of the file; their CRC."""
        crc, done = 0, 0
        self.file.seek(begin)
        while done < len(out):
            piece = out[done : done + _PIECE]
            count = self.file.readinto(piece)  # type: ignore[attr-defined]
            if not count:
                raise EOFError("the file ends early")
            crc, done = zlib.crc32(piece[:count], crc), done + count
        return crc

    def _crc(self, item: zipfile.ZipInfo, begin: int) -> int:
        """The CRC of a member of which a part is read: computed once."""
        if item.filename in self._whole:
            return item.CRC
        crc, piece = 0, memoryview(bytearray(min(_PIECE, item.file_size)))
        for start in range(0, item.file_size, _PIECE):
            part = piece[: min(_PIECE, item.file_size - start)]
            self._fill(begin + start, part)
            crc = zlib.crc32(part, crc)
        return crc

    def _inflate(self, item: zipfile.ZipInfo, start: int, out: memoryview) -> None:
        """As `read`, of a member that is compressed: zipfile checks the CRC at the end."""
        with self.zip.open(item) as data:
            left = start
            while left:
                skipped = len(data.read(min(left, _PIECE)))
                if not skipped:
                    raise EOFError("it ends early")
                left -= skipped
            done = 0
            while done < len(out):
                count = data.readinto(out[done : done + _PIECE])  # type: ignore[attr-defined]
                if not count:
                    raise EOFError("it ends early")
                done += count
            rest = item.file_size - start - len(out)
            while piece := data.read(_PIECE):
                rest -= len(piece)
            if rest:
                raise EOFError("it has another length than announced")


class BinReader(TensorReader):
    """Tensors of `pytorch_model*.bin`."""

    def __init__(self, files: Sequence[Path]):
        self._archives: dict[Path, _Archive] = {}
        self._tensors: dict[str, tuple[_Archive, SavedTensor]] = {}
        self._scratch = np.empty(0, np.uint8)
        self._held: str | None = None
        super().__init__(files)

    def _list(self, file: Path) -> Iterator[tuple[str, tuple[int, ...], np.dtype]]:
        archive = self._archives[file] = _Archive(file)
        try:
            state = read_state(archive.pickle)
        except WouldRun as error:
            raise CheckpointError(f"{file} is refused: its pickle would run {error}, which is no tensor") from error
        except ValueError as error:
            raise CheckpointError(f"{file} is refused: its pickle is damaged ({error})") from error
        if not isinstance(state, dict):
            raise CheckpointError(f"{file} holds a {type(state).__name__}, not a mapping from names to tensors")
        announced = 0
        for name, tensor in state.items():
            if not isinstance(name, str) or not isinstance(tensor, SavedTensor):
                raise CheckpointError(
                    f"{file} holds {name!r:.200}: {type(tensor).__name__}, which is no tensor: save the state_dict() alone"
                )
            dtype = _KNOWN.get(tensor.storage.dtype)
            if dtype is None:
                raise CheckpointError(f"{file}: {name} has dtype {tensor.storage.dtype}, which no weight of these models has")
            item = archive.member(tensor.storage.key)
            stored, wanted = item.file_size if item else 0, tensor.storage.size * dtype.itemsize
            if item is None or stored != wanted:
                fault = "is missing" if item is None else f"has {stored:,} bytes"
                raise CheckpointError(
                    f"{file} is damaged: the member data/{tensor.storage.key} {fault}, where {name} needs {wanted:,} bytes"
                )
            announced += max(math.prod(tensor.shape), tensor.extent) * dtype.itemsize
            plain = plain_name(name)
            self._tensors[plain] = archive, tensor
            yield plain, tensor.shape, dtype
        size = file.stat().st_size
        if announced > _EXPANSION * size + _ALLOWANCE:
            raise CheckpointError(
                f"{file} is refused: it has {size:,} bytes and announces tensors of {announced:,}. Weights do not compress "
                "so far: these are views that repeat values, or zeros; save the tensors anew, each .clone()d"
            )

    def read(self, name: str, region: Region | None = None) -> np.ndarray:
        return np.array(self.borrow(name)[... if region is None else region])

    def borrow(self, name: str) -> np.ndarray:
        archive, tensor = self._tensors[name]
        dtype = self.dtypes[name]
        nbytes = tensor.extent * dtype.itemsize
        if self._held != name:  # the regions of one tensor are asked for one after the other
            self._held = None
            if self._scratch.size < nbytes:
                self._scratch = np.empty(0, np.uint8)  # release the smaller one first
                self._scratch = np.empty(nbytes, np.uint8)
            item = archive.member(tensor.storage.key)
            assert item is not None  # checked when the file was opened
            if nbytes:
                archive.read(item, tensor.offset * dtype.itemsize, memoryview(self._scratch[:nbytes]))
            self._held = name
        strides = [step * dtype.itemsize for step in tensor.stride]
        return np.ndarray(tensor.shape, dtype, self._scratch[:nbytes], 0, strides)

    def close(self) -> None:
        for archive in self._archives.values():
            archive.zip.close()
            archive.file.close()
        self._archives, self._tensors, self._held, self._scratch = {}, {}, None, np.empty(0, np.uint8)
