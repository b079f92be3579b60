"""The `convert` command as a function: open the source, write the destination atomically, report what is unusual."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..directories import check_free_space, temporary_directory, whole_directory
from ..errors import InputError
from ..io import say
from .leaves import total_bytes
from .manifest import Checksums, describe, write_manifest
from .opened import Checkpoint, open_checkpoint
from .progress import byte_bar
from .safetensors_file import DTYPES
from .to_hf import parse_size, write_hf

__all__ = ["Conversion", "convert", "parse_dtype"]

_MARGIN = 64 << 20  # bytes for config, tokenizer and the checkpoint's own bookkeeping


@dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        destination: the directory that was written.
        kind: "orbax" or "hf".
        tensors: their number.
        nbytes: of the weights.
        warnings: what the user should know, such as weights that are not finite.
    """

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

    In a job of several jax processes all call this with the same Mesh, and each writes what its own devices hold.

    Args:
        source: a Hugging Face directory, a bundled name, a Hub id, a safetensors file, or an orbax directory of ours, of a
            model or of a training run.
        destination: the directory to write.
        to: "orbax" or "hf"; default: what the source is not.
        dtype: of the result; default: each tensor keeps its own.
        mesh: a jax Mesh, or a mapping {"data": …, "fsdp": …, "tensor": …}, whose shards the chunks of an orbax checkpoint
            follow.
        max_shard_size: of the safetensors files, "4GB" or a number of bytes.
        revision: branch, tag or commit of a Hub id.
        config: the config.json, if it is not beside the weights.
        force: replace an existing checkpoint at the destination.
        quiet: show no progress.
        notify: called with every line for the user.

    Raises:
        CheckpointError, ConfigError, InputError: the destination is then as it was.
    """
    with open_checkpoint(source, revision=revision, config_file=config) as opened:
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
        job = _Job(opened, Path(destination), dtype=wanted, nbytes=size, force=force, quiet=quiet, notify=notify)
        bad = job.to_orbax(mesh) if kind == "orbax" else job.to_hf(limit)
    warnings = tuple(
        f"{name} has {count:,} values that are NaN or infinite" + (f" in {wanted.name}" if wanted is not None else "")
        for name, count in sorted(bad.items())
    )
    for line in warnings:
        notify(f"warning: {line}")
    return Conversion(Path(destination), kind, len(opened.leaves), size, warnings)


@dataclass(frozen=True)
class _Job:
    """A conversion that has been checked. Both methods return the number of values that are not finite by tensor."""

    source: Checkpoint
    destination: Path
    dtype: np.dtype | None
    nbytes: int
    force: bool
    quiet: bool
    notify: Callable[[str], None]

    def _describe(self, target: Path) -> None:
        describe(target, self.source.config, dtype=self.dtype or self.source.dtype, companions=self.source.root)

    def to_hf(self, max_shard_bytes: int) -> Mapping[str, int]:
        from .hosts import process_count

        if process_count() > 1:
            raise InputError("safetensors files are written by one process: run the export outside the distributed job")
        with whole_directory(self.destination, self.force, self.notify) as target:
            self._describe(target)
            with byte_bar("exporting", self.nbytes, quiet=self.quiet) as bar:
                return write_hf(
                    target,
                    self.source.leaves,
                    dtype=self.dtype,
                    max_shard_bytes=max_shard_bytes,
                    base=self.source.layout == "base",
                    progress=bar.update,
                )

    def to_orbax(self, mesh: Any) -> Mapping[str, int]:
        from ..model import SmolVLMForConditionalGeneration
        from ..parameters import flatten_params, logical_axes
        from .chunks import MeshShape
        from .hosts import barrier, process_index
        from .to_orbax import OrbaxWriter

        source, process = self.source, process_index()
        mesh = MeshShape(mesh) if isinstance(mesh, Mapping) else mesh
        axes = flatten_params(logical_axes(SmolVLMForConditionalGeneration(source.model_config)))
        with byte_bar("converting", self.nbytes, quiet=self.quiet or process > 0) as bar:
            writer = OrbaxWriter(self.dtype, mesh, process, bar.update)
            if process > 0:
                barrier("the destination is claimed")
                writer.write(temporary_directory(self.destination) / "params", source.leaves, axes)
                barrier("the destination is complete")
                return writer.nonfinite
            checksums = Checksums(source.root, source.files)
            with whole_directory(self.destination, self.force, self.notify) as target:
                barrier("the destination is claimed")
                writer.write(target / "params", source.leaves, axes)
                self._describe(target)
                write_manifest(
                    target,
                    source=source.name,
                    revision=source.revision,
                    commit=source.commit,
                    step=source.step,
                    layout=source.layout,
                    dtype=(self.dtype or source.dtype).name,
                    mesh=None if mesh is None else dict(mesh.shape),
                    files=checksums.result(),
                )
            barrier("the destination is complete")
        return writer.nonfinite
