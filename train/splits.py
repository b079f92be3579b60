"""Which files of a directory belong to which split, by the words in their names. No jax in this module."""

import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError

__all__ = ["choose_files"]

# As in Hugging Face's `datasets`.
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words}
# Words as they are delimited: by capitals (cocoVal), or by anything that is no small letter (COCOval, VAL_1).
_FORMS = ("[A-Z]?[a-z]+", "[a-z]+", "[A-Z]+(?![a-z])")
_SHOWN = 10


def choose_files(folder: Path, files: Sequence[Path], splits: Sequence[str], *, explicit: bool) -> list[Path]:
    """The files of a split.

    A file belongs to the split that a word of its name says (coco_val.jsonl, val-00000.jsonl, train2017.jsonl); if none does,
    to that of its folder, or of the nearest folder above.

    Args:
        folder: where the files are, at any depth.
        files: to choose from.
        splits: names in the order in which they are wanted; the first that there is counts.
        explicit: the user named the split, so that files without splits will not do.

    Raises:
        InputError: there is no such split, or the names leave open which files are meant.
    """
    found: dict[str | None, list[Path]] = {}
    for file in files:
        named = _splits_of(file.relative_to(folder), [split for split in splits if split not in _SPLITS])
        if len(named) > 1:
            raise InputError(f"{file} speaks of several splits, {' and '.join(sorted(named))}: name the files to read")
        found.setdefault(next(iter(named), None), []).append(file)
    unnamed = found.get(None, [])
    there = [split for split in dict.fromkeys((*_WORDS, *found)) if split is not None and split in found]
    if unnamed == list(files):
        if explicit:
            raise InputError(f"{folder} has neither splits nor configurations: leave out split and name")
        return list(files)
    if unnamed:
        raise InputError(
            f"{folder} has files of the split {', '.join(there)}, and {_listed(folder, unnamed)}, whose names say no split: "
            "name the files to read"
        )
    for split in splits:
        if chosen := found.get(_SPLITS.get(split, split)):
            return chosen
    if len(found) == 1 and explicit:
        raise InputError(f"{folder} has neither splits nor configurations beside {there[0]}: leave out split and name")
    raise InputError(f"{folder} has no split {' or '.join(splits)}; it has {', '.join(there)} ({_listed(folder, files)})")


def _splits_of(path: Path, own: Sequence[str]) -> set[str]:
    """The splits that the file's name speaks of, or else the nearest folder that speaks of one. own: names beyond the usual."""
    for part in reversed(path.parts):
        words = {word.lower() for form in _FORMS for word in re.findall(form, part)}
        named = {_SPLITS[word] for word in words if word in _SPLITS}
        named |= {name for name in own if re.search(rf"(?<![^\W_]){re.escape(name.lower())}(?![^\W_])", part.lower())}
        if named:
            return named
    return set()


def _listed(folder: Path, files: Sequence[Path]) -> str:
    names = [str(file.relative_to(folder)) for file in files[:_SHOWN]]
    return ", ".join(names) + (f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else "")
