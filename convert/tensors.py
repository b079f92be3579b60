"""The PyTorch weights of a directory: one file, or shards with an index, as safetensors or as pickles."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import CheckpointError, MissingFileError, first_few
from ..io import read_json
from .readers import TensorReader, check_names, checked_path, plain_name
from .safetensors_file import INDEX, MAX_JSON, SINGLE, SafetensorsReader
from .torch_bin import BinReader

__all__ = ["check_whole", "open_tensors"]

_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")


def open_tensors(directory: Path) -> TensorReader:
    """The weights of a Hugging Face directory: safetensors if there are any, else `pytorch_model*.bin`.

    Raises:
        CheckpointError: there are none, or a file, or the index of several files, is not what it should be.
    """
    single, index = directory / SINGLE, directory / INDEX
    if index.exists() and single.exists():
        raise CheckpointError(f"{directory} has both {single.name} and {index.name}: remove the one that is out of date")
    names = [single.name] if single.exists() else _names(directory, "*.safetensors")
    if index.exists() or names:
        return _open(directory, SafetensorsReader, index, names)
    index, names = directory / "pytorch_model.bin.index.json", _names(directory, "pytorch_model*.bin")
    if index.exists() or names:
        return _open(directory, BinReader, index, names)
    raise CheckpointError(f"{directory} has neither *.safetensors, nor pytorch_model*.bin, nor an orbax checkpoint")


def check_whole(file: Path) -> None:
    """Raise CheckpointError if a file is one of several that the weights are divided into, by its name."""
    part = _SHARD.fullmatch(file.name)
    if part and int(part[2]) > 1:
        index = f", which {INDEX} lists" if (file.parent / INDEX).is_file() else ""
        raise CheckpointError(
            f"{file} is one of the {int(part[2])} shards of the weights{index}: pass the directory {file.parent}"
        )


def _names(directory: Path, pattern: str) -> list[str]:
    return sorted(path.name for path in directory.glob(pattern))


def _open(directory: Path, reader: type[TensorReader], index: Path, names: Sequence[str]) -> TensorReader:
    """The tensors of the files that the index names, or without an index those of the files `names`."""
    if not index.exists():
        for stem, count, ending in {part.groups() for name in names if (part := _SHARD.fullmatch(name))}:
            shards = [f"{stem}-{number:05}-of-{count}{ending}" for number in range(1, int(count) + 1)]
            _check_all_there(directory, shards, "the names of the others count")
        return reader([checked_path(directory, name) for name in names])
    weight_map, files = _read_index(directory, index)
    tensors = reader(files)
    _check_index(index, weight_map, tensors.file_names)
    return tensors


def _check_all_there(directory: Path, names: Sequence[str], said: str) -> None:
    """Raise MissingFileError for shards that are not in a directory; `said`: what says that there are these."""
    lost = [name for name in names if not os.path.lexists(directory / name)]
    if lost:
        are = "is" if len(lost) == 1 else "are"
        count = f"{len(lost)} of the {len(names)} files that {said} {are} not there"
        raise MissingFileError(f"cannot open {directory / lost[0]}: No such file: {count}; download the whole repository")


def _read_index(directory: Path, index: Path) -> tuple[dict[str, str], list[Path]]:
    """The weight map of an index file and the files it names, all inside the directory."""
    what = "an index of checkpoint shards"
    weight_map = read_json(checked_path(directory, index.name), what=what, unique_keys=True, limit=MAX_JSON).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} is not {what}: it has no weight_map from names to files")
    check_names(index, [*weight_map, *weight_map.values()])
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names a file outside its directory: {name}")
    _check_all_there(directory, names, f"{index.name} names")
    weight_map = {plain_name(name): file for name, file in weight_map.items()}
    return weight_map, [checked_path(directory, name) for name in names]


def _check_index(index: Path, weight_map: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Raise one CheckpointError unless index and files name the same tensors in the same places."""
    problems = [f"missing   {name}, which {file} should hold" for name, file in weight_map.items() if name not in found]
    problems += [
        f"surplus   {name} in {file}, which the index does not have there"
        for name, file in found.items()
        if weight_map.get(name) != file
    ]
    if problems:
        raise CheckpointError(f"{index} and its shards disagree\n  " + "\n  ".join(first_few(sorted(problems))))
