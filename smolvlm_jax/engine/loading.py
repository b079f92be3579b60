"""An engine on the devices of this host, from a checkpoint's name."""

import os
from pathlib import Path

from ..arguments import parse_mesh

__all__ = ["is_docling", "load_engine"]


def is_docling(directory: str | os.PathLike) -> bool:
    """Whether the checkpoint writes doctags, which are special tokens: they are its answer, not decoration."""
    tokenizer = Path(directory) / "tokenizer.json"
    return tokenizer.is_file() and b'"<doctag>"' in tokenizer.read_bytes()


def load_engine(
    source: str | os.PathLike,
    *,
    dtype: str | None = None,
    mesh: str | None = None,
    keep_special_tokens: bool | None = None,
    attention: str = "auto",
    **config,
):
    """An Engine for a bundled name, a directory or a Hub id, on all local devices: no collective between hosts, so that any of
    them may die.

    mesh: sizes like "data=2,tensor=2"; by default every device is data parallel. keep_special_tokens: by default for docling
    checkpoints. attention: as in `load`. config: fields of EngineConfig. Raises CheckpointError and InputError.
    """
    import jax

    from ..checkpoint import load, resolve
    from ..processing import SmolVLMProcessor
    from ..sharding import make_mesh
    from .engine import Engine, EngineConfig

    directory, devices, sizes = resolve(source), jax.local_devices(), parse_mesh(mesh)
    if sizes is not None:
        placed = make_mesh(**sizes, devices=devices)
    else:
        placed = make_mesh(data=-1, devices=devices) if len(devices) > 1 else None
    keep = is_docling(directory) if keep_special_tokens is None else keep_special_tokens
    model, params = load(directory, dtype=dtype, mesh=placed, attention=attention)
    processor = SmolVLMProcessor.from_pretrained(directory)
    return Engine(model, params, processor, EngineConfig(keep_special_tokens=keep, **config), placed)
