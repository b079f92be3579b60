"""An engine on the devices of this host, from a checkpoint's name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..arguments import parse_mesh

__all__ = ["check_settings", "is_docling", "load_engine"]


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
    report: Callable[..., None] | None = None,
    **options,
):
    """An Engine on all devices of this host. Hosts do not communicate, so that one may fail without the others.

    Args:
        source: a bundled name, a directory, a Hub id, or a PEFT adapter.
        base: as in `load`.
        mesh: sizes like "data=2,tensor=2". Default: every device is data parallel.
        keep_special_tokens: as in `EngineConfig`. Default: for docling checkpoints.
        report: as in `Engine`.
        **options: `dtype`, `attention`, `check` and fields of `EngineConfig`, as in `Engine.from_pretrained`.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        InputError: the settings contradict the model or the devices.
    """
    from ..checkpoint import resolve, resolve_file
    from .engine import Engine

    source = resolve_file(source)  # of the Hub's one commit, though a branch may move on meanwhile
    directory = resolve(source, base=base)
    keep = is_docling(directory) if keep_special_tokens is None else keep_special_tokens
    options |= {"mesh": _mesh_here(mesh), "keep_special_tokens": keep}
    return Engine.from_pretrained(source, base=base, report=report, **options)


def check_settings(directory: str | os.PathLike, *, mesh: str | None = None, attention: str = "auto", **settings: Any) -> None:
    """Check what `load_engine` would refuse, without the weights.

    Args:
        directory: with the model's config.json.
        mesh: as in `load_engine`.
        attention: as in `load`.
        **settings: fields of `EngineConfig`.

    Raises:
        ConfigError: there is no such form of attention.
        InputError: the settings contradict the model or the devices.
    """
    from ..attention import check_form
    from ..config import SmolVLMConfig
    from ..model import SmolVLMForConditionalGeneration
    from .settings import EngineConfig

    check_form(attention)
    model = SmolVLMForConditionalGeneration(SmolVLMConfig.from_pretrained(directory))
    EngineConfig(**settings).resolve(model, _mesh_here(mesh))


def _mesh_here(mesh: str | None) -> Any:
    """A mesh of all devices of this host; None for one device."""
    import jax

    from ..sharding import make_mesh

    devices, sizes = jax.local_devices(), parse_mesh(mesh)
    if sizes is None and len(devices) > 1:
        sizes = {"data": len(devices)}
    return None if sizes is None else make_mesh(**sizes, devices=devices)
