"""Keep freed memory with the process: on a CPU every step allocates and frees the same gigabytes.

XLA's CPU backend allocates a step's activations anew. glibc returns blocks of that size to the system at once, and in the next
step every page of them is faulted in and zeroed again: a million page faults a step of the 256M (2 × 512 tokens, float32, two
cores). A step takes 4.8 s without them and 5.5 s with them; where a hypervisor takes free pages away between steps, 9 s.
"""

import ctypes
import importlib.util
import os
import sys

__all__ = ["keep_freed_memory"]

# Constants of <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_ACCELERATORS = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin")


def keep_freed_memory() -> bool:
    """Where jax runs on the CPU, make glibc's malloc keep what is freed, large blocks included, in one arena.

    Call it before jax starts its threads.

    Returns:
        Whether anything was done: not without glibc, nor on hosts of accelerators, which need the memory for other things.
    """
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(importlib.util.find_spec, _ACCELERATORS))
    if not on_cpu or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1}  # never trim
    taken = [library.mallopt(name, value) == 1 for name, value in settings.items()]
    return all(taken)
