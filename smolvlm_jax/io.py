"""Atomic files, and the locks that tell a running writer from one that was killed; text and JSON, read
with a size limit and errors that name the file; the small files that accompany a checkpoint."""

import errno
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple

from .errors import CheckpointError, MissingFileError, SmolVLMError
from .storage import AnyPath, Entry, StorePath, is_store, place, remove

try:
    import fcntl
except ImportError:  # not POSIX: without locks it is not known whether a writer is dead, so its files are not removed
    fcntl = None  # type: ignore[assignment]

__all__ = ["COMPANIONS", "HOST", "MAX_TEXT", "Identity", "companion_files", "copy_companions", "create_json", "errors_name"]
__all__ += ["lock", "parse_json", "read_bytes", "read_json", "read_text", "remove_dead", "render_page", "sync_directory"]
__all__ += ["to_json", "try_lock", "unique_name", "wait_for_lock", "whole_file", "write_json", "write_text"]

HOST = "".join(c if c.isalnum() or c == "-" else "-" for c in socket.gethostname()) or "host"
MAX_TEXT = 100_000_000  # bytes; also the limit of the safetensors library for its headers
# Of a JSON file, in bytes, values and levels: as objects of Python, a file of empty lists takes thirty times its size.
_MAX_JSON, _MAX_VALUES, _MAX_DEPTH = 8_000_000, 500_000, 64
# Files of a checkpoint beside its weights, apart from config.json, which is written anew with the weights.
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


class Identity(NamedTuple):
    """What tells a file from another one, and from itself after it was written to."""

    device: int
    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, file: str | os.PathLike | StorePath | int) -> "Identity":
        """Of a path, links followed, of a descriptor, or of an object in a store. Raises OSError."""
        if isinstance(file, StorePath) or (isinstance(file, str) and is_store(file)):
            return cls.of_object(StorePath.of(str(file)).info())
        info = os.stat(file)
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)

    @classmethod
    def of_object(cls, entry: Entry) -> "Identity":
        """Of an object, whose tag changes whenever it is written."""
        return cls(0, int.from_bytes(hashlib.blake2b(entry.tag.encode(), digest_size=7).digest(), "big"), entry.size, 0)


def unique_name() -> str:
    """HOST.PID-RANDOM: no two writers share one, on whatever machine or in whatever container they run."""
    return f"{HOST}.{os.getpid()}-{secrets.token_hex(4)}"


@contextmanager
def whole_file(path: AnyPath) -> Iterator[IO[bytes]]:
    """Write a file atomically.

    Yields a binary file with a temporary name in the directory of `path`. It is flushed to the disk and renamed to `path`
    when the block ends, and removed if the block raises. What becomes an object in a store is in memory until then.
    """
    if isinstance(path, StorePath):
        buffer = BytesIO()
        yield buffer
        path.write_bytes(buffer.getvalue())
        return
    temporary = path.with_name(f".{path.name}.{unique_name()}.tmp")
    try:
        with errors_name(path), open(temporary, "wb") as file:
            try_lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Within the block, an OSError that names no file, as those of an open file do not, names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def lock(file: IO | int) -> bool:
    """Lock an open file or directory until it is closed or its process ends.

    Returns:
        False if another process holds the lock.

    Raises:
        OSError: the file system, or the platform, has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOLCK, "this platform has no file locks")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def wait_for_lock(file: IO, *, shared: bool) -> None:
    """Wait until no lock of another process excludes this one, and lock an open file until it is closed or its process ends.
    Where there are no locks nothing happens.

    Args:
        file: a lock that is not shared may need it open for writing.
        shared: several processes may hold the lock at a time, if all of them share it.
    """
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)


def try_lock(file: IO) -> bool:
    """As `lock`, and False as well where there are no locks."""
    try:
        return lock(file)
    except OSError:
        return False


def remove_dead(paths: Iterable[AnyPath], foreign: bool = False) -> None:
    """Remove files, named as `unique_name` says, whose writers have ended.

    Args:
        paths: files that their writers keep locked.
        foreign: also remove files of other hosts, and objects in a store, whose locks cannot be seen here. Only for files that
            are no longer needed.
    """
    paths = list(paths)
    if foreign:
        remove(path for path in paths if isinstance(path, StorePath))
    for path in paths:
        if isinstance(path, StorePath):
            continue
        ours = f".{HOST}." in path.name
        if ours or foreign:
            with suppress(OSError), open(path, "rb") as file:
                if not ours or try_lock(file):
                    path.unlink(missing_ok=True)


def sync_directory(directory: AnyPath) -> None:
    """Make renames in a directory survive a power cut, on file systems that support it."""
    if isinstance(directory, StorePath):
        return
    with suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_bytes(path: str | os.PathLike, *, error: type[SmolVLMError] = CheckpointError, limit: int = MAX_TEXT) -> bytes:
    """What a file holds. Raises `error` if it cannot be read, is no file (a pipe would block) or exceeds `limit` bytes."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise error(f"cannot read {path}: it is no regular file")
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except (OSError, ValueError) as fault:
        absent = isinstance(fault, FileNotFoundError) and issubclass(MissingFileError, error)
        kind = MissingFileError if absent else error
        raise kind(f"cannot read {path}: {getattr(fault, 'strerror', None) or fault}") from fault
    if len(data) > limit:
        raise error(f"cannot read {path}: it has more than {limit:,} bytes")
    return data


def read_text(path: str | os.PathLike, error: type[SmolVLMError] = CheckpointError, limit: int = MAX_TEXT) -> str:
    """The text of a UTF-8 file, with its line ends as they are. Raises `error` as `read_bytes` does."""
    try:
        return read_bytes(path, error=error, limit=limit).decode("utf-8")
    except UnicodeDecodeError as fault:
        raise error(f"cannot read {path}: it is no text in UTF-8 ({fault.reason} at byte {fault.start})") from fault


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {next(name for name, count in counts.items() if count > 1)!r:.80} occurs twice")
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
        value = json.loads(text, object_pairs_hook=unique_pairs if unique_keys else None)
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
    limit: int = _MAX_JSON,
) -> dict[str, Any]:
    """The object in a JSON file that may come from elsewhere.

    Args:
        path: the file.
        what: what the file should be, for the message "PATH is not WHAT: …".
        error: the exception to raise.
        missing_ok: return {} if there is no such file.
        unique_keys: as in `parse_json`.
        limit: bytes of the file; parsed, JSON can take 25 times its size.

    Raises:
        SmolVLMError: an `error`, if the file cannot be read or does not hold a JSON object.
    """
    if missing_ok and not os.path.exists(path):
        return {}
    text = read_text(path, error, limit)
    try:
        if text.count(",") > _MAX_VALUES:  # before Python makes millions of objects of them
            raise ValueError(f"it holds more than {_MAX_VALUES:,} values")
        value = parse_json(text, unique_keys)
        _check_extent(value)
        return value
    except ValueError as fault:
        raise error(f"{path} is not {what}: {fault}") from fault


def _check_extent(value: Any) -> None:
    """Raise ValueError for a JSON value that would be slow to walk through."""
    level, count = [value], 0
    for _ in range(_MAX_DEPTH):
        count += sum(map(len, level))
        if count > _MAX_VALUES:
            raise ValueError(f"it holds more than {_MAX_VALUES:,} values")
        level = [item for held in level for item in (held.values() if isinstance(held, dict) else held)]
        level = [item for item in level if isinstance(item, (dict, list))]
        if not level:
            return
    raise ValueError("it is nested too deeply")


def write_text(path: str | os.PathLike | StorePath, text: str | bytes) -> str:
    """Write a file atomically, in UTF-8 and with the line ends of `text`; make its directory if there is none.

    Returns:
        The path, as a string.

    Raises:
        CheckpointError: what should be the directory is a file.
    """
    target = place(path)
    if isinstance(target, Path):
        if target.parent.is_file():
            raise CheckpointError(f"{str(target.parent)!r} is a file; pass a directory to save to")
        target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as file:
        file.write(text.encode("utf-8") if isinstance(text, str) else text)
    return str(path)


def to_json(value: Any, indent: int | None = None, sort_keys: bool = False) -> bytes:
    """A value as JSON in UTF-8 with a line end. Half a surrogate pair, which JSON allows and UTF-8 does not, is escaped."""
    try:
        text = json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, sort_keys=sort_keys).encode()
    return text + b"\n"


def write_json(path: str | os.PathLike | StorePath, value: Any, sort_keys: bool = False) -> str:
    """Write a value as indented JSON. Returns and raises as `write_text`."""
    return write_text(path, to_json(value, indent=2, sort_keys=sort_keys))


def render_page(template: Path, **values: Any) -> str:
    """An HTML page.

    Args:
        template: A file in jinja's language.
        **values: For the names in it. Texts are escaped.
    """
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(read_text(template)).render(values)


def create_json(path: AnyPath, value: Any) -> bool:
    """Write a value as indented JSON unless the file exists; of several processes one succeeds.

    Returns:
        False if the file exists.
    """
    if isinstance(path, StorePath):
        return path.create(to_json(value, indent=2))
    draft = path.with_name(f".{path.name}.{unique_name()}.tmp")
    try:
        with errors_name(path), open(draft, "wb") as file:
            try_lock(file)
            file.write(to_json(value, indent=2))
            file.flush()
            os.fsync(file.fileno())
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


def companion_files(directory: str | os.PathLike) -> dict[str, Path]:
    """The tokenizer, processor and generation files that a checkpoint directory has, by name."""
    return {name: path for name in COMPANIONS if (path := Path(directory) / name).exists()}


def copy_companions(companions: Mapping[str, Path], target: Path) -> None:
    """Copy tokenizer, processor and generation files, by name, into a directory."""
    for name, path in companions.items():
        shutil.copyfile(path, target / name)
