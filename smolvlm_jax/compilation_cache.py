"""Where compiled programs are kept between processes. Importing this module imports nothing heavy."""

import os
from pathlib import Path

from .directories import make_directory
from .errors import InputError
from .staging import reading
from .storage import AnyPath, StorePath, place

__all__ = ["cache_directory", "check_cache", "keep_compiled_programs"]

_SHORTEST = 0.2  # seconds of compilation below which a program is not worth a file
_CHOSEN, _LIMIT = "JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"


def cache_directory() -> AnyPath | None:
    """The directory of compiled programs: what JAX_COMPILATION_CACHE_DIR says, which may be in an object store, else one below
    XDG_CACHE_HOME or ~/.cache; None for a user without a home, as containers have them.

    Raises:
        InputError: a URL that is no place in a store.
    """
    if chosen := os.environ.get(_CHOSEN):
        return place(chosen)
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return home / "smolvlm_jax" / "programs" if home.is_absolute() else None


def check_cache(where: AnyPath | None = None) -> None:
    """Ask the store in which programs are kept, if they are in one, since jax would only warn, at each program, that it cannot.

    Args:
        where: the directory; default: what JAX_COMPILATION_CACHE_DIR says.

    Raises:
        InputError: it is a URL that is no place in a store, or a file, or the size of the cache is bounded, for
            which jax needs a disk.
        MissingExtraError: of the library for such stores.
        CheckpointError, DownloadError, UnreachableError: it denies access, there is no such bucket, or it does not answer.
    """
    if where is None and os.environ.get(_CHOSEN):
        where = cache_directory()
    if isinstance(where, StorePath):
        if os.environ.get(_LIMIT, "-1") not in ("", "-1"):
            raise InputError(f"{_LIMIT} bounds a cache on a disk, and {where} is in an object store: unset it")
        with reading(where):
            next(where.entries(), None)
    elif where is not None and where.exists() and not where.is_dir():
        raise InputError(f"compiled programs are kept in a directory, and {where} is a file")
    elif where is not None:
        make_directory(where, "the directory of compiled programs (--compilation-cache, JAX_COMPILATION_CACHE_DIR)")


def keep_compiled_programs(where: str | os.PathLike | None = None) -> None:
    """Have jax keep compiled programs between processes.

    Args:
        where: a directory, or a URL of an object store. Default: `cache_directory`, unless the user has told jax where, or that
            they do not want it.

    Raises:
        as `check_cache` does.
    """
    import jax

    if where is not None:
        chosen = place(where)
        check_cache(chosen)
        _keep_in(chosen if isinstance(chosen, StorePath) else chosen.absolute())
        return
    check_cache()
    if jax.config.values["jax_compilation_cache_dir"] is None and _CHOSEN not in os.environ:
        found = cache_directory()
        if found is not None:
            _keep_in(found)


def _keep_in(where: AnyPath) -> None:
    import jax

    jax.config.update("jax_compilation_cache_dir", str(where))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
