"""Text and JSON files: read with a size limit and errors that name the file, written atomically."""

import glob
import json
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SmolVLMError
from .files import remove_dead, sync_directory, unique_name, whole_file

__all__ = ["MAX_TEXT", "create_json", "parse_json", "read_json", "read_text", "to_json", "write_json", "write_text"]

MAX_TEXT = 100_000_000  # bytes; also the limit of the safetensors library for its headers


def read_text(path: str | os.PathLike, error: type[SmolVLMError] = CheckpointError) -> str:
    """The text of a UTF-8 file, with its line ends as they are. Raises `error` if it cannot be read or exceeds `MAX_TEXT`."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TEXT + 1)
        if len(data) > MAX_TEXT:
            raise error(f"cannot read {path}: it has more than {MAX_TEXT:,} bytes")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise error(f"cannot read {path}: {getattr(fault, 'strerror', None) or fault}") from fault


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def parse_json(text: str | bytes, unique_keys: bool = False) -> dict[str, Any]:
    """The object that a JSON text holds.

    Args:
        text: the text, in UTF-8 if it is bytes.
        unique_keys: refuse an object that has a key twice, of which json.loads would keep the last one.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or holds something else than an object.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def read_json(
    path: str | os.PathLike,
    *,
    what: str = "valid JSON",
    error: type[SmolVLMError] = CheckpointError,
    missing_ok: bool = False,
    unique_keys: bool = False,
) -> dict[str, Any]:
    """The object in a JSON file that somebody else may have written.

    Args:
        path: the file.
        what: what the file should be, for the message "PATH is not WHAT: …".
        error: the exception to raise.
        missing_ok: return {} if there is no such file.
        unique_keys: as in `parse_json`.

    Raises:
        SmolVLMError: an `error`, if the file cannot be read or does not hold a JSON object.
    """
    if missing_ok and not os.path.exists(path):
        return {}
    text = read_text(path, error)
    try:
        return parse_json(text, unique_keys)
    except ValueError as fault:
        raise error(f"{path} is not {what}: {fault}") from fault


def write_text(path: str | os.PathLike, text: str | bytes) -> str:
    """Write a file atomically, in UTF-8 and with the line ends of `text`; make its directory if there is none.

    Returns:
        The path, as a string.

    Raises:
        CheckpointError: what should be the directory is a file.
    """
    target = Path(path)
    if target.parent.is_file():
        raise CheckpointError(f"{str(target.parent)!r} is a file; pass a directory to save to")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_dead(target.parent.glob(f".{glob.escape(target.name)}.*.tmp"))
    with whole_file(target) as file:
        file.write(text.encode("utf-8") if isinstance(text, str) else text)
    return os.fspath(path)


def to_json(value: Any, indent: int | None = None, sort_keys: bool = False) -> bytes:
    """A value as JSON in UTF-8 with a line end. Half a surrogate pair, which JSON allows and UTF-8 does not, is escaped."""
    try:
        text = json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, sort_keys=sort_keys).encode()
    return text + b"\n"


def write_json(path: str | os.PathLike, value: Any, sort_keys: bool = False) -> str:
    """Write a value as indented JSON. Returns and raises as `write_text`."""
    return write_text(path, to_json(value, indent=2, sort_keys=sort_keys))


def create_json(path: Path, value: Any) -> bool:
    """Write a value as indented JSON unless the file exists; of several processes one succeeds.

    Returns:
        False if the file exists.
    """
    draft = path.with_name(f".{path.name}.{unique_name()}.tmp")
    write_json(draft, value)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # a mounted bucket has no hard links; who calls this writes the same file as the others
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync_directory(path.parent)
    return True
