"""The trial of kernels: whether the kernels for TPUs, and cuDNN's on GPUs, work on the chip at hand.

The kernels are written against an interface of jax that is experimental, for chips of several generations. So each of them is
run once in a process on its chip, on a small example beside the formula; a kernel that fails or differs is not used, and a
warning says so. `load` and the engine's warm-up run the trials. A program that is traced before that runs them itself.
"""

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .cudnn import cudnn_attention, cudnn_step
from .decode import decode_attention
from .decode_limits import decode_pieces
from .forms import SegmentMask, by_einsum
from .int8 import dequantize, quantize
from .paged import paged_step
from .splash import splash_attention
from .work import work_list

__all__ = [
    "cudnn_example",
    "cudnn_step_example",
    "decode_example",
    "decode_int8_example",
    "paged_example",
    "splash_example",
    "trusted",
]

# Largest norm of the difference over the norm of the result: rounding to bfloat16 makes 0.003.
_TOLERANCE = 0.02
# Weight of the output in `decode_example`, whose norm is small beside that of the cache: an error in either must show.
_OUTPUT_WEIGHT = 100.0


@functools.cache
def trusted(example: Callable[[], tuple[jax.Array, jax.Array]]) -> bool:
    """Whether the two results of `example`, of a kernel and of the formula, agree on the chip of this process.

    True in a process without such a chip: it compiles for what it does not have, and cannot try. The verdict is kept.
    """
    if jax.default_backend() != ("gpu" if example in (cudnn_example, cudnn_step_example, paged_example) else "tpu"):
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


def _decode_example(dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Four rows and a ring of 256 columns that has come round: the output and the new column, by the kernel and by the formula.

    One row sees the whole ring, one a part that crosses its end, one the new column alone, one has finished.
    """
    rows, queries, heads, length, size = 4, 9, 3, 256, 64
    start, live = jnp.asarray(40), jnp.asarray([length, 100, 1, 0])
    q, k, v, old = _inputs((rows, queries, 1, size), *[(rows, heads, 1, size)] * 2, (rows, length, 2 * heads, size))
    new, scales = jnp.concatenate([k, v], 1).swapaxes(1, 2), None
    kept = old
    if dtype == jnp.int8:
        kept, scales = quantize(old)
        new, old = dequantize(*quantize(new)), dequantize(kept, scales)
        scales = jnp.pad(scales[..., 0].swapaxes(1, 2), ((0, 0), (0, 2), (0, 0)))[:, None]
    pairs = kept.reshape(rows, 1, length, 2 * heads * size)
    pieces = decode_pieces(length, pairs.shape[3], size, dtype)
    assert pieces is not None
    out, pairs, scales = decode_attention(q, k, v, pairs, scales, start, work_list(live[None], start, pieces))

    seen = (start - jnp.arange(length)) % length < live[:, None]
    both = jnp.where((jnp.arange(length) == start)[:, None, None], new, old).astype(jnp.float32)
    keys, values = jnp.split(both.swapaxes(1, 2), 2, 1)
    exact = jnp.where(live[:, None, None, None] > 0, _plain(q, keys, values, seen[:, None]), 0)
    ours = pairs.reshape(both.shape)
    if scales is not None:
        ours = dequantize(ours, scales[:, 0, : 2 * heads].swapaxes(1, 2)[..., None])
    columns = seen[..., None, None]
    ours, wanted = jnp.where(columns, ours, 0), jnp.where(columns, both, 0)
    together = lambda *arrays: jnp.concatenate([x.astype(jnp.float32).ravel() for x in arrays])
    return together(out * _OUTPUT_WEIGHT, ours), together(exact * _OUTPUT_WEIGHT, wanted)


def cudnn_example() -> tuple[jax.Array, jax.Array]:
    """A packed row of two prompts, and the gradient of its queries: by cuDNN, and by the formula."""
    q, k, v, towards = _inputs((1, 6, 512, 64), (1, 2, 512, 64), (1, 2, 512, 64), (1, 6, 512, 64))
    ids = (jnp.arange(512) // 300)[None]
    mask = (ids[:, :, None] == ids[:, None, :]) & jnp.tril(jnp.ones((512, 512), bool))
    described = SegmentMask(mask, ids, causal=True)

    def both(function):
        out, backward = jax.vjp(function, q)
        return jnp.stack([out.astype(jnp.float32), backward(towards.astype(out.dtype))[0].astype(jnp.float32)])

    return both(lambda q: cudnn_attention(q, k, v, described)), both(lambda q: _plain(q, k, v, mask))


def cudnn_step_example() -> tuple[jax.Array, jax.Array]:
    """One query a row and a cache of which rows see different columns: by cuDNN, and by the formula."""
    q, k, v = _inputs((4, 6, 1, 64), (4, 2, 256, 64), (4, 2, 256, 64))
    seen = (40 - jnp.arange(256)) % 256 < jnp.asarray([256, 100, 1, 30])[:, None, None]
    return cudnn_step(q, k, v, seen), _plain(q, k, v, seen)


def paged_example() -> tuple[jax.Array, jax.Array]:
    """The same with keys and values in one array."""
    q, pairs = _inputs((4, 6, 1, 64), (4, 4, 256, 64))
    seen = (40 - jnp.arange(256)) % 256 < jnp.asarray([256, 100, 1, 30])[:, None, None]
    return paged_step(q, pairs, seen), _plain(q, pairs[:, ::2], pairs[:, 1::2], seen)


def decode_example() -> tuple[jax.Array, jax.Array]:
    """A decode step with a bfloat16 cache."""
    return _decode_example(jnp.bfloat16)


def decode_int8_example() -> tuple[jax.Array, jax.Array]:
    """A decode step with an int8 cache."""
    return _decode_example(jnp.int8)
