"""Small text files of a checkpoint directory, with errors that name the file."""

import json
import os

from ..errors import CheckpointError


def read_text(path: str) -> str:
    """The file's text. Raises CheckpointError if it cannot be read as UTF-8."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {path!r}: {error}") from error


def read_json(path: str, missing_ok: bool = False) -> dict:
    """The object in a json file; {} for a file that is not there where `missing_ok`."""
    if missing_ok and not os.path.exists(path):
        return {}
    try:
        value = json.loads(read_text(path))
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path!r} is not valid json: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path!r} holds a {type(value).__name__}; it needs a json object")
    return value


def write_text(directory, name: str, text: str) -> str:
    """Write `text` to `name` in `directory` (made if need be) and return the path."""
    directory = os.fspath(directory)
    if os.path.isfile(directory):
        raise CheckpointError(f"{directory!r} is a file; pass a directory to save to")
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, name)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    return path


def write_json(directory, name: str, value: dict) -> str:
    """Write `value` as json to `name` in `directory` and return the path."""
    return write_text(directory, name, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
