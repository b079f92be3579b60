"""What a translation consists of, and how its files are written."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..io import copy_companions, write_json

__all__ = ["Translation"]


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A checkpoint's small files in our spelling.

    Attributes:
        family: "nanovlm" or "smolvla".
        config: what config.json would hold.
        written: further files by name, as the JSON that they hold.
        copied: further files by name, taken from elsewhere as they are.
        missing: why there is no tokenizer, in words; empty if there is one.
    """

    family: str
    config: Mapping[str, Any]
    written: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    copied: Mapping[str, Path] = field(default_factory=dict)
    missing: str = ""

    def write(self, directory: Path) -> None:
        """Write all files into a directory."""
        copy_companions(self.copied, directory)
        for name, content in {**self.written, "config.json": self.config}.items():
            write_json(directory / name, content)
