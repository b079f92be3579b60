"""Where compiled programs are kept between processes. Importing this module imports nothing heavy."""

import os
from pathlib import Path

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


def check_cache() -> None:
    """Ask the store in which programs are kept, if they are in one, since jax would only warn, at each program, that it cannot.

    Raises:
        InputError: JAX_COMPILATION_CACHE_DIR is a URL that is no place in a store, or the size of the cache is bounded, for
            which jax needs a disk.
        MissingExtraError: of the library for such stores.
        CheckpointError, DownloadError, UnreachableError: it denies access, there is no such bucket, or it does not answer.
    """
    where = cache_directory() if os.environ.get(_CHOSEN) else None
    if isinstance(where, StorePath):
        if os.environ.get(_LIMIT, "-1") not in ("", "-1"):
            raise InputError(f"{_LIMIT} bounds a cache on a disk, and {where} is in an object store: unset it")
        with reading(where):
            next(where.entries(), None)


def keep_compiled_programs() -> None:
    """Have jax keep compiled programs in `cache_directory`, unless the user has said where, or that they do not want it. Raises
    as `check_cache` does."""
    import jax

    check_cache()
    if jax.config.values["jax_compilation_cache_dir"] is None and _CHOSEN not in os.environ:
        where = cache_directory()
        if where is not None:
            jax.config.update("jax_compilation_cache_dir", str(where))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
