"""Checkpoints of other families that hold the same model: their config.json and their small files in the spelling of ours.

The names of their tensors are in `convert.family_names`. A family is recognised by its config.json. Features that are not
supported here are refused, by the name of the key. Imports no jax.
"""

from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError
from ..io import read_json
from . import nanovlm, smolvla
from .translation import Translation

__all__ = ["Translation", "translated"]


def translated(directory: Path, find: Callable[[str], Path], config: Path | None = None) -> Translation | None:
    """What a directory holds, in our spelling; None if it is spelled so already, or has no config.json that can be read.

    Args:
        directory: of the checkpoint.
        find: from the name of another model, of which a family takes some files, to its directory.
        config: the config.json, if it is not in the directory.

    Raises:
        ConfigError: its config.json asks for something that is not computed here.
        CheckpointError: a file is damaged.
    """
    path = directory / "config.json" if config is None else config
    try:
        data = read_json(path, error=ConfigError, missing_ok=True)
    except ConfigError:  # who needs the file says what is wrong with it
        return None
    for family in (nanovlm, smolvla):
        if family.recognises(data):
            return family.translate(path, data, find)
    return None
