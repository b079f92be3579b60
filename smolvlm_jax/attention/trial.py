"""When the kernels for TPUs are taken: where they fit, where the user allows them, and where they have been tried.

They are written against an interface that is experimental in jax, for chips of several generations. So the first time that a
process on a TPU could use one, it runs there on a small example beside plain einsums; a kernel that fails or differs is not
used, and a warning says so.
"""

import functools
import os
import threading
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .decode import decode_attention, fits_decode
from .splash import fits_splash, splash_attention

__all__ = ["trusted", "use_decode_kernel", "use_splash_kernel"]

# A switch for the user, because the kernels are experimental; no example can show every shape.
FUSED = os.environ.get("SMOLVLM_JAX_FUSED_ATTENTION", "1") != "0"
# Norm of the difference by norm of the result: bfloat16 gives 0.003.
_TOLERANCE = 0.02


def use_splash_kernel(q: jax.Array, k: jax.Array) -> bool:
    """Whether a program for TPU takes `splash_attention` for these queries and keys."""
    return FUSED and fits_splash(q, k) and trusted(splash_example)


def use_decode_kernel(q: jax.Array, keys: jax.Array) -> bool:
    """Whether a program for TPU takes `decode_attention` for these queries and this cache."""
    return FUSED and fits_decode(q, keys) and trusted(decode_example)


@functools.cache
def trusted(example: Callable[[], tuple[jax.Array, jax.Array]]) -> bool:
    """Whether the two results of `example` agree on this process's TPU. A process without one compiles for others and cannot
    try."""
    if jax.default_backend() != "tpu":
        return True
    found: list[str | None] = []
    # In a thread of its own, which knows nothing of the program being traced, nor of its mesh.
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
    try:
        ours, wanted = (x.astype(jnp.float32) for x in jax.jit(lambda: example())())
        distance = float(jnp.linalg.norm(ours - wanted) / jnp.linalg.norm(wanted))
    except Exception as error:  # whatever a compiler can raise: there is another way to the same result
        reason = str(error).strip().partition("\n")[0][:200]
        return f"failed ({type(error).__name__}: {reason})"
    return None if distance <= _TOLERANCE else f"is wrong (off by {distance:.3g} of the result)"


def _inputs(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]


def _plain(q, k, v, mask) -> jax.Array:
    """Attention as the formula has it; mask (b, t, s)."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("bnth,bnsh->bnts", q, k, precision="highest") * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
    return jnp.einsum("bnts,bnsh->bnth", weights, v, precision="highest")


def splash_example() -> tuple[jax.Array, jax.Array]:
    """A packed row of two prompts, by the kernel and by the formula."""
    q, k, v = _inputs((1, 6, 512, 64), (1, 2, 512, 64), (1, 2, 512, 64))
    ids = (jnp.arange(512) // 300)[None]
    mask = (ids[:, :, None] == ids[:, None, :]) & jnp.tril(jnp.ones((512, 512), bool))
    return splash_attention(q, k, v, ids, causal=True), _plain(q, k, v, mask)


def decode_example() -> tuple[jax.Array, jax.Array]:
    """Four rows and a ring of 256 columns, by the kernel and by the formula: output and what the cache then holds."""
    q, k, v, keys, values = _inputs((4, 9, 1, 64), (4, 3, 1, 64), (4, 3, 1, 64), (4, 3, 256, 64), (4, 3, 256, 64))
    start = jnp.asarray(200)
    mask = ((jnp.arange(256) * 7 % 5 > 1) | (jnp.arange(256) == start))[None, None].repeat(4, 0)
    ours = decode_attention(q, k, v, keys, values, mask, start)
    keys, values = (jax.lax.dynamic_update_slice(x, new, (0, 0, start, 0)) for x, new in ((keys, k), (values, v)))
    together = lambda *arrays: jnp.concatenate([x.astype(jnp.float32).ravel() for x in arrays])
    weight = 100.0  # the output is small beside the cache, and both shall count
    return together(ours[0] * weight, *ours[1:]), together(_plain(q, keys, values, mask) * weight, keys, values)
