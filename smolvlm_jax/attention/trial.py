"""The trial of kernels: whether the kernels for TPUs work on the chip at hand.

The kernels are written against an interface of jax that is experimental, for chips of several generations. So each of them is
run once in a process on a TPU, on a small example beside the formula; a kernel that fails or differs is not used, and a warning
says so. `load` and the engine's warm-up run the trials. A program that is traced before that runs them itself.
"""

import functools
import threading
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .decode import decode_attention
from .forms import by_einsum
from .splash import splash_attention

__all__ = ["decode_example", "splash_example", "trusted"]

# Largest norm of the difference over the norm of the result: rounding to bfloat16 makes 0.003.
_TOLERANCE = 0.02
# Weight of the output in `decode_example`, whose norm is small beside that of the cache: an error in either must show.
_OUTPUT_WEIGHT = 100.0


@functools.cache
def trusted(example: Callable[[], tuple[jax.Array, jax.Array]]) -> bool:
    """Whether the two results of `example`, of a kernel and of the formula, agree on the TPU of this process.

    True in a process without a TPU: it compiles for chips that it does not have, and cannot try. The verdict is kept.
    """
    if jax.default_backend() != "tpu":
        return True
    found: list[str | None] = []
    # In a thread of its own, because a program may be in the middle of being traced, with a mesh in scope, and both are
    # properties of the thread.
    thread = threading.Thread(target=lambda: found.append(_fault(example)))
    thread.start()
    thread.join()
    if found[0] is not None:
        warnings.warn(
            f"{example.__name__}: the kernel {found[0]} on {jax.devices()[0].device_kind}; einsums are used instead, which are "
            "slower and need more memory",
            stacklevel=2,
        )
    return found[0] is None


def _fault(example: Callable[[], tuple[jax.Array, jax.Array]]) -> str | None:
    """What is wrong with the kernel, or None."""
    try:
        ours, wanted = (x.astype(jnp.float32) for x in jax.jit(lambda: example())())
        distance = float(jnp.linalg.norm(ours - wanted) / jnp.linalg.norm(wanted))
    except Exception as error:  # whatever a compiler raises: the other forms compute the same
        reason = str(error).strip().partition("\n")[0][:200]
        return f"failed ({type(error).__name__}: {reason})"
    return None if distance <= _TOLERANCE else f"is wrong (off by {distance:.3g} of the result)"


def _inputs(*shapes: tuple[int, ...]) -> list[jax.Array]:
    """Random bfloat16 arrays, the same every time."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def _plain(q, k, v, mask) -> jax.Array:
    """The einsums in float32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    return by_einsum(q, k, v, mask)


def splash_example() -> tuple[jax.Array, jax.Array]:
    """A packed row of two prompts: by the kernel, and by the formula."""
    q, k, v = _inputs((1, 6, 512, 64), (1, 2, 512, 64), (1, 2, 512, 64))
    ids = (jnp.arange(512) // 300)[None]
    mask = (ids[:, :, None] == ids[:, None, :]) & jnp.tril(jnp.ones((512, 512), bool))
    return splash_attention(q, k, v, ids, causal=True), _plain(q, k, v, mask)


def decode_example() -> tuple[jax.Array, jax.Array]:
    """Four rows and a cache of 256 columns: the output and the updated cache, by the kernel and by the formula."""
    q, k, v, keys, values = _inputs((4, 9, 1, 64), (4, 3, 1, 64), (4, 3, 1, 64), (4, 3, 256, 64), (4, 3, 256, 64))
    start = jnp.asarray(200)
    mask = ((jnp.arange(256) * 7 % 5 > 1) | (jnp.arange(256) == start))[None, None].repeat(4, 0)
    ours = decode_attention(q, k, v, keys, values, mask, start)
    keys, values = (jax.lax.dynamic_update_slice(x, new, (0, 0, start, 0)) for x, new in ((keys, k), (values, v)))
    together = lambda *arrays: jnp.concatenate([x.astype(jnp.float32).ravel() for x in arrays])
    return together(ours[0] * _OUTPUT_WEIGHT, *ours[1:]), together(_plain(q, keys, values, mask) * _OUTPUT_WEIGHT, keys, values)
