"""Where compiled programs are kept between processes. Importing this module imports nothing heavy."""

import os
from pathlib import Path

__all__ = ["cache_directory", "keep_compiled_programs"]

_SHORTEST = 0.2  # seconds of compilation below which a program is not worth a file


def cache_directory() -> Path | None:
    """The directory of compiled programs: what JAX_COMPILATION_CACHE_DIR says, else one below XDG_CACHE_HOME or ~/.cache; None
    for a user without a home, as containers have them."""
    if chosen := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return Path(chosen)
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return home / "smolvlm_jax" / "programs" if home.is_absolute() else None


def keep_compiled_programs() -> None:
    """Have jax keep compiled programs in `cache_directory`, unless the user has said where, or that they do not want it."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        place = cache_directory()
        if place is not None:
            jax.config.update("jax_compilation_cache_dir", str(place))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
