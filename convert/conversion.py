"""The `convert` command as a function: open the source, write the destination whole, say what was odd."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..io import check_free_space, copy_companions, say, temporary_directory, whole_directory
from .leaves import total_bytes
from .manifest import Checksums, write_manifest
from .progress import Progress
from .source import Source, open_source
from .tensors import DTYPES
from .to_hf import parse_size, write_hf

__all__ = ["Conversion", "convert", "parse_dtype"]

_MARGIN = 64 << 20  # config, tokenizer and the checkpoint's own bookkeeping


@dataclass(frozen=True)
class Conversion:
    """What was done. nbytes: of the weights. warnings: what the user should know, such as weights that are not finite."""

    destination: Path
    kind: str
    tensors: int
    nbytes: int
    warnings: tuple[str, ...]


def parse_dtype(name: Any) -> np.dtype | None:
    """A numpy dtype from "float32", "bfloat16", "float16" or anything numpy takes for one of them; None stays None."""
    if name is None:
        return None
    known = {dtype.name: dtype for dtype in DTYPES.values()}
    try:
        found = known.get(name) if isinstance(name, str) else known.get(np.dtype(name).name)
    except TypeError:
        found = None
    if found is None:
        raise InputError(f"dtype {name!r} is none of {', '.join(known)}")
    return found


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    to: str | None = None,
    dtype: Any = None,
    mesh: Any = None,
    max_shard_size: str | int = "4GB",
    revision: str | None = None,
    config: str | os.PathLike | None = None,
    force: bool = False,
    quiet: bool = False,
    notify: Callable[[str], None] = say,
) -> Conversion:
    """Convert a checkpoint, one tensor at a time, in memory bounded by the largest tensor.

    source: a Hugging Face directory, a Hub id, a safetensors file, or an orbax directory of ours, of a model or of a training
    run. to: "orbax" or "hf"; default: the other kind. dtype: of the result; default: each tensor keeps its own.
    mesh: a jax Mesh, or a mapping {"data": …, "fsdp": …, "tensor": …}, whose shards the chunks of an orbax checkpoint follow.
    In a job of several jax processes all call this with the same Mesh, and each writes what its own devices hold.
    max_shard_size: of the safetensors files. revision: of a Hub id. config: a config.json elsewhere.

    Raises CheckpointError, ConfigError or InputError; the destination is then as it was.
    """
    from ..checkpoint import resolve_file

    place = resolve_file(source, revision)
    opened = open_source(place, None if config is None else Path(config))
    try:
        kind = to or ("orbax" if opened.kind == "hf" else "hf")
        if kind not in ("orbax", "hf"):
            raise InputError(f"cannot convert to {kind!r}: the choices are orbax and hf")
        if kind == "hf" and mesh is not None:
            raise InputError("a mesh says how an orbax checkpoint is cut; safetensors shards are cut by max_shard_size")
        wanted, limit = parse_dtype(dtype), parse_size(max_shard_size)
        if opened.root.resolve().is_relative_to(Path(destination).resolve()):
            raise InputError(f"{destination} is or contains the source {opened.root}: choose another destination")
        size = total_bytes(opened.leaves, wanted)
        check_free_space(Path(destination), size + _MARGIN)
        options = _Options(str(source), place, revision, wanted, mesh, limit, force, quiet, notify)
        bad = _to_orbax(opened, Path(destination), options) if kind == "orbax" else _to_hf(opened, Path(destination), options)
    finally:
        opened.close()
    warnings = tuple(
        f"{name} has {count:,} values that are NaN or infinite" + (f" in {wanted.name}" if wanted is not None else "")
        for name, count in sorted(bad.items())
    )
    for line in warnings:
        notify(f"warning: {line}")
    return Conversion(Path(destination), kind, len(opened.leaves), size, warnings)


@dataclass(frozen=True)
class _Options:
    name: str
    place: Path
    revision: str | None
    dtype: np.dtype | None
    mesh: Any
    max_shard_bytes: int
    force: bool
    quiet: bool
    notify: Callable[[str], None]


def _describe(source: Source, target: Path, dtype: np.dtype) -> None:
    """The small files: config.json with the dtype of the weights, and what came with them, as it was."""
    source.config.replace(dtype=dtype.name).save_pretrained(target)
    copy_companions(source.root, target)


def _to_hf(source: Source, destination: Path, options: _Options) -> Mapping[str, int]:
    from .hosts import process_count

    if process_count() > 1:
        raise InputError("safetensors files are written by one process: run the export outside the distributed job")
    with whole_directory(destination, options.force, options.notify) as target:
        _describe(source, target, options.dtype or source.dtype)
        with Progress("exporting", total_bytes(source.leaves, options.dtype), options.quiet) as progress:
            return write_hf(
                target,
                source.leaves,
                dtype=options.dtype,
                max_shard_bytes=options.max_shard_bytes,
                base=source.layout == "base",
                progress=progress,
            ).nonfinite


def _to_orbax(source: Source, destination: Path, options: _Options) -> Mapping[str, int]:
    from ..model import SmolVLMForConditionalGeneration
    from ..parameters import flatten_params, logical_axes
    from .chunks import MeshShape
    from .hosts import barrier, process_index
    from .to_orbax import OrbaxWriter, write_orbax

    mesh = MeshShape(options.mesh) if isinstance(options.mesh, Mapping) else options.mesh
    axes = flatten_params(logical_axes(SmolVLMForConditionalGeneration(source.model_config)))
    first = process_index() == 0
    with Progress("converting", total_bytes(source.leaves, options.dtype), options.quiet or not first) as progress:
        writer = OrbaxWriter(options.dtype, mesh, process_index(), progress)
        if not first:
            barrier("the destination is claimed")
            write_orbax(temporary_directory(destination) / "params", source.leaves, axes, writer)
            barrier("the destination is whole")
            return writer.nonfinite
        checksums = Checksums(source.root, source.files)
        with whole_directory(destination, options.force, options.notify) as target:
            barrier("the destination is claimed")
            write_orbax(target / "params", source.leaves, axes, writer)
            _describe(source, target, options.dtype or source.dtype)
            write_manifest(
                target,
                source=options.name,
                revision=options.revision,
                commit=_commit(options.place),
                step=source.step,
                layout=source.layout,
                dtype=(options.dtype or source.dtype).name,
                mesh=None if mesh is None else dict(mesh.shape),
                files=checksums.result(),
            )
        barrier("the destination is whole")
    return writer.nonfinite


def _commit(place: Path) -> str | None:
    """The commit of a snapshot in the Hub's cache: its folder is named so."""
    return place.name if place.parent.name == "snapshots" else None
