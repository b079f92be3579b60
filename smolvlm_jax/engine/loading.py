"""An engine on the devices of this host, from a checkpoint's name."""

import os
from pathlib import Path

from ..arguments import parse_mesh

__all__ = ["is_docling", "load_engine"]


def is_docling(directory: str | os.PathLike) -> bool:
    """Whether the checkpoint writes doctags: special tokens that belong to the answer's text."""
    files = (Path(directory) / name for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"))
    return any(b'"<doctag>"' in file.read_bytes() for file in files if file.is_file())


def load_engine(
    source: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    mesh: str | None = None,
    keep_special_tokens: bool | None = None,
    **options,
):
    """An Engine on all devices of this host. Hosts do not communicate, so that one may fail without the others.

    Args:
        source: a bundled name, a directory, a Hub id, or a PEFT adapter.
        base: as in `load`.
        mesh: sizes like "data=2,tensor=2". Default: every device is data parallel.
        keep_special_tokens: as in `EngineConfig`. Default: for docling checkpoints.
        **options: `dtype`, `attention`, `check` and fields of `EngineConfig`, as in `Engine.from_pretrained`.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        InputError: the settings contradict the model or the devices.
    """
    import jax

    from ..checkpoint import resolve, resolve_file
    from ..sharding import make_mesh
    from .engine import Engine

    source = resolve_file(source)  # of the Hub's one commit, though a branch may move on meanwhile
    directory, devices, sizes = resolve(source, base=base), jax.local_devices(), parse_mesh(mesh)
    if sizes is None and len(devices) > 1:
        sizes = {"data": len(devices)}
    placed = None if sizes is None else make_mesh(**sizes, devices=devices)
    keep = is_docling(directory) if keep_special_tokens is None else keep_special_tokens
    return Engine.from_pretrained(source, base=base, mesh=placed, keep_special_tokens=keep, **options)
