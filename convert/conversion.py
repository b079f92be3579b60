"""The `convert` command as a function: open the source, write the destination atomically, report what is unusual."""

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..directories import temporary_directory
from ..dtypes import dtype_name
from ..errors import InputError
from ..habits import named_arguments
from ..locate import adapted, resolve_file
from ..parameters import flatten_params, logical_axes, spanned_dimensions, with_scales
from ..progress import Progress
from ..retrieval_model import model_of
from ..staging import check_room, new_directory
from ..storage import AnyPath, StorePath, place
from ..terminal import say
from .arrays import checksum
from .chunks import abstract_mesh
from .from_orbax import find_checkpoint, open_orbax
from .hosts import barrier, everyones, process_count, process_index
from .leaves import INT8, Leaf, total_bytes
from .manifest import Checksums, describe, write_manifest
from .opened import Checkpoint, open_checkpoint
from .progress import ByteCount
from .quantized import quantization, quantized_leaves
from .to_hf import parse_size, write_hf
from .to_orbax import OrbaxWriter

__all__ = ["Conversion", "convert"]

_MARGIN = 64 << 20  # bytes for config, tokenizer and the checkpoint's own bookkeeping


@dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        destination: the directory that was written, or the place in a store.
        kind: "orbax" or "hf".
        tensors: their number.
        scales: the number of arrays of scales beside them, of weights in 8 bits.
        nbytes: of the weights.
        warnings: what the user should know, such as weights that are not finite.
    """

    destination: AnyPath
    kind: str
    tensors: int
    nbytes: int
    warnings: tuple[str, ...]
    scales: int = 0


@named_arguments
def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    to: str | None = None,
    dtype: Any = None,
    mesh: Any = None,
    max_shard_size: str | int | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    config: str | os.PathLike | None = None,
    base: str | os.PathLike | None = None,
    adapter: str | os.PathLike | None = None,
    force: bool = False,
    check: bool = False,
    quiet: bool = False,
    notify: Callable[[str], None] = say,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint, one tensor at a time, in memory bounded by the largest tensor.

    In a job of several jax processes all call this with the same Mesh, and each writes what its own devices hold.

    Args:
        source: a Hugging Face directory, a bundled name, a Hub id, a URL of an object store, a safetensors file, an orbax
            directory of ours, of a model or of a training run, or the directory of a PEFT adapter, which is merged
            into its base.
        destination: the directory to write, also a URL of an object store.
        to: "orbax" or "hf"; default: what the source is not; with `quantize` "orbax".
        dtype: of the result, as in `load`; default: each tensor keeps its own. Weights in 8 bits become it too, unless
            `quantize` is given.
        mesh: a jax Mesh, or a mapping {"data": …, "fsdp": …, "tensor": …}, whose shards the chunks of an orbax checkpoint
            follow.
        max_shard_size: of safetensors files, such as "500MB", or a number of bytes; default: "4GB".
        quantize: "int8": store the matrices of projections and the table of tokens in 8 bits, with a scale for each channel
            (see `quantization`), in an orbax checkpoint.
        revision: branch, tag or commit of a Hub id.
        config: the config.json, if it is not beside the weights.
        base: the model that an adapter is merged into, named as `source` is; default: the one its config names.
        adapter: a PEFT adapter that is merged into `source`.
        force: replace an existing checkpoint at the destination, which is kept beside it as `NAME_replaced-1`, or with the
            next free number.
        check: say if the source has no checksums of its arrays. Where it has, they are always compared.
        quiet: show no progress.
        notify: called with every line for the user.
        progress: where progress is shown, which this call closes; default: one of its own, unless `quiet`.

    Returns:
        What was done, with what the user should know.

    Raises:
        CheckpointError, ConfigError, InputError, ChangedError: the destination is then as it was. The last means that the
            source changed while it was read.
    """
    if adapter is not None and revision is not None:
        source, revision = resolve_file(source, revision), None
    source, base = adapted(source, adapter, base)
    first = process_index() == 0
    shown = Progress(show=first and not quiet) if progress is None else progress
    shown.tell(f"reading {source}")
    with shown, open_checkpoint(source, revision=revision, config_file=config, base=base) as opened:
        kind = to or ("orbax" if opened.kind == "hf" or quantize else "hf")
        if kind not in ("orbax", "hf"):
            raise InputError(f"cannot convert to {kind!r}: the choices are orbax and hf")
        if kind == "hf" and mesh is not None:
            raise InputError("a mesh says how an orbax checkpoint is cut; safetensors shards are cut by max_shard_size")
        wanted = None if dtype is None else np.dtype(dtype_name(dtype))
        limit = parse_size("4GB" if max_shard_size is None else max_shard_size)
        if kind == "orbax" and max_shard_size is not None:
            raise InputError(
                "max_shard_size cuts safetensors files; an orbax checkpoint is cut by a mesh: leave it out, or write hf"
            )
        leaves = _chosen(opened, kind, wanted, quantize)
        final = place(destination)
        _check_apart(opened, final)
        if kind == "hf" and process_count() > 1:
            raise InputError("safetensors files are written by one process: run the export outside the distributed job")
        size = total_bytes(leaves, wanted)
        check_room(final, size + _MARGIN)
        for line in (*opened.notes, *_without_tokenizer(opened, final)) if first else ():
            notify(line)
        if isinstance(final, Path) and not first:
            claimed: Any = nullcontext(temporary_directory(final))
        else:
            claimed = new_directory(final, force, notify)
        with claimed as target, opened.unchanged():
            if first:
                shown.tell("comparing the source with its checksums")
                if not opened.check_arrays() and check:
                    notify(f"{source} has no checksums of its arrays: nothing was checked")
                describe(target, opened.config, dtype=wanted or opened.dtype, companions=opened.companions)
            bar = ByteCount(shown, f"writing {final}", size)
            if kind == "hf":
                bare = opened.layout == "base"
                bad = write_hf(target, leaves, dtype=wanted, max_shard_bytes=limit, base=bare, progress=bar.update)
            else:
                bad = _write_orbax(target, opened, leaves, wanted, mesh, bar.update)
            shown.tell(f"flushing {final} to the disk")
        barrier("the destination is complete")
    warnings = tuple(
        f"{name} has {count:,} values that are NaN or infinite" + (f" in {wanted.name}" if wanted is not None else "")
        for name, count in sorted(bad.items())
    )
    for line in warnings:
        notify(f"warning: {line}")
    scales = sum(leaf.dtype == INT8 for leaf in leaves.values())  # each of those tensors has one array of them
    return Conversion(final, kind, len(leaves) - scales, size, warnings, scales)


def _without_tokenizer(source: Checkpoint, destination: AnyPath) -> list[str]:
    """A line if there is no tokenizer to copy, and none has been made and none is missing by another note."""
    if {"tokenizer.json", "vocab.json"} & set(source.companions) or any("tokenizer" in line for line in source.notes):
        return []
    return [
        f"{source.name} has no tokenizer.json, and {destination} will have none: copy the files of the "
        "processor into it, or no question can be asked"
    ]


def _chosen(source: Checkpoint, kind: str, dtype: np.dtype | None, quantize: str | None) -> Mapping[str, Leaf]:
    """The leaves to write: those in 8 bits where that is asked for, or where they are stored so and nothing else is wanted."""
    if quantize not in (None, "int8"):
        raise InputError(
            f"cannot quantize to {quantize!r:.40}: the choice is int8; leave it out to keep the weights as they are stored"
        )
    if quantize and kind == "hf":
        raise InputError(
            "transformers has no form for weights in 8 bits as they are quantized here: leave out quantize, or write orbax"
        )
    if kind == "orbax" and source.quantized and (quantize or dtype is None):
        return source.quantized
    return quantized_leaves(source.leaves, spanned_dimensions(model_of(source.model_config))) if quantize else source.leaves


def _check_apart(source: Checkpoint, destination: AnyPath) -> None:
    """Raise InputError if a destination cannot be written, because it holds the source or not all processes would see it."""
    if isinstance(destination, StorePath):
        if process_count() > 1:
            raise InputError(
                f"{destination} is in an object store, where only one process can write a checkpoint: in a job of several name "
                "a directory that all of them see, such as a mounted bucket"
            )
        origin = place(source.name)
        if isinstance(origin, StorePath) and (origin == destination or origin.below(destination)):
            raise InputError(f"{destination} is or contains the source {source.name}: choose another destination")
        if isinstance(origin, StorePath) and destination.below(origin):
            raise InputError(f"{destination} lies inside the source {source.name}: choose another destination")
        return
    for root in (source.root, source.path):
        if Path(os.path.realpath(root)).is_relative_to(os.path.realpath(destination)):  # resolve() raises for a loop
            raise InputError(f"{destination} is or contains the source {root}: choose another destination")
    if Path(os.path.realpath(destination)).is_relative_to(os.path.realpath(source.path)):
        raise InputError(f"{destination} lies inside the source {source.path}: choose another destination")


def _write_orbax(
    target: Path,
    source: Checkpoint,
    leaves: Mapping[str, Leaf],
    dtype: np.dtype | None,
    mesh: Any,
    progress: Callable[[int], object],
) -> dict[str, int]:
    """Write the parameters, all processes together, and the manifest. Returns the values that are not finite by parameter."""
    mesh = abstract_mesh(mesh) if isinstance(mesh, Mapping) else mesh
    in_8_bits = [path for path, leaf in leaves.items() if leaf.dtype == INT8]
    model = model_of(source.model_config)
    axes = flatten_params(with_scales(model, logical_axes(model), in_8_bits))
    writer = OrbaxWriter(dtype, mesh, process_index(), progress)
    checksums = Checksums(source.root, source.files) if process_index() == 0 else None
    barrier("the destination is claimed")
    writer.write(target / "params", leaves, axes)
    arrays = writer.checksums if process_count() == 1 else _checksums_together(target / "params")
    if checksums is not None:
        write_manifest(
            target,
            source=source.name,
            revision=source.revision,
            commit=source.commit,
            step=source.step,
            layout=source.layout,
            dtype=(dtype or source.dtype).name,
            **quantization(leaves),
            mesh=None if mesh is None else dict(mesh.shape),
            files=checksums.result(),
            arrays=dict(sorted(arrays.items())),
        )
    return writer.nonfinite


def _checksums_together(directory: Path) -> dict[str, str]:
    """Of all arrays that several processes have written in parts: each process reads its share of them back."""
    barrier("the arrays are written")
    found = find_checkpoint(directory)
    leaves = {} if found is None else open_orbax(found)
    share = sorted(leaves)[process_index() :: process_count()]
    parts = everyones({path: checksum(leaves[path].borrow()) for path in share})
    return {path: text for part in parts for path, text in part.items()}
