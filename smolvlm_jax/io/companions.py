"""The small files that accompany the weights of a checkpoint, apart from config.json, which is rewritten with the weights."""

import os
import shutil
from pathlib import Path

__all__ = ["COMPANIONS", "companion_files", "copy_companions"]

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def companion_files(directory: str | os.PathLike) -> dict[str, Path]:
    """The tokenizer, processor and generation files that a checkpoint directory has, by name."""
    return {name: path for name in COMPANIONS if (path := Path(directory) / name).exists()}


def copy_companions(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy the tokenizer, processor and generation files of the directory `source` into the directory `target`."""
    for name, path in companion_files(source).items():
        shutil.copyfile(path, Path(target) / name)
