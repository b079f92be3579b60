"""Cross-entropy that never holds all logits: head and loss a few tokens at a time, gradient included.

Logits of 8 rows of 2,048 tokens over 49,280 words are 3.2 GB in float32, and a plain loss keeps several such arrays. Here a
loop computes the logits of a few columns and their loss and discards them; the backward pass computes them again. Columns
without a label are moved to the end, where whole chunks of them are skipped: in fine-tuning most tokens belong to a picture or
a prompt, so the head's products cost little even when computed twice.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..precision import matmul_precision
from .config import IGNORE

__all__ = ["chunked_loss", "next_token_targets", "row_axes"]

_SLICE_BYTES = 32 << 20


def next_token_targets(labels: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """labels (b, t) shifted left by one, -100 in the last column and wherever the next token belongs to another segment."""
    after = jnp.full_like(labels[:, :1], IGNORE)
    targets = jnp.concatenate([labels[:, 1:], after], axis=1)
    if segment_ids is not None:
        same = jnp.concatenate([segment_ids[:, 1:] == segment_ids[:, :-1], jnp.zeros_like(after, bool)], axis=1)
        targets = jnp.where(same, targets, IGNORE)
    return targets


def chunked_loss(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, *, chunk: int = 256, tied: bool = False, dtype=jnp.float32
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sum of cross-entropies over targets that are not -100, their number, and how many of them rank first.

    Differentiable in hidden and kernel. On a mesh each device computes its own rows; the gradient of the kernel is reduced over
    devices once, not once a chunk.

    Args:
        hidden: (b, t, d).
        kernel: (d, v), or with `tied` the embedding (v, d).
        targets: int (b, t), already shifted.
        chunk: tokens of one device whose logits exist at a time.
        tied: which layout `kernel` has.
        dtype: of the product; softmax and sums are float32.

    Returns:
        () float32, () int32, () int32.
    """
    rows_alone = functools.partial(_columns, chunk=chunk, tied=tied, dtype=jnp.dtype(dtype))
    fn: Callable = rows_alone
    axes = tuple(row_axes(hidden.shape[0]))
    if axes:
        rows, whole = PartitionSpec(axes), PartitionSpec()

        def local(*arguments):
            return tuple(jax.lax.psum(part, axes) for part in rows_alone(*arguments))

        # The kernel is cast before it is gathered: half the bytes in bfloat16.
        fn = jax.shard_map(local, in_specs=(rows, whole, rows), out_specs=(whole,) * 3, axis_names=set(axes), check_vma=False)
    return fn(hidden, kernel.astype(dtype), targets)


def row_axes(rows: int) -> dict[str, int]:
    """The axes of the mesh in scope that the rows of a batch are split over, with their sizes; none if they do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else {axis: mesh.shape[axis] for axis in ("data", "fsdp") if mesh.shape.get(axis, 1) > 1}
    return sizes if rows % math.prod(sizes.values()) == 0 else {}


def _columns(hidden, kernel, targets, *, chunk: int, tied: bool, dtype):
    """The rows of one device, chunk by chunk of columns."""
    b, t, _ = hidden.shape
    width = max(1, min(t, chunk // max(b, 1)))
    # Labelled columns first, row by row, so that as many chunks as possible have no label.
    order = jnp.argsort(targets == IGNORE, axis=1, stable=True)
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
    targets = jnp.take_along_axis(targets, order, axis=1)
    short = -t % width
    hidden = jnp.pad(hidden, ((0, 0), (0, short), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, short)), constant_values=IGNORE)
    return _loss(hidden, kernel, targets, width, tied, dtype)


def _logits(x, kernel, tied: bool, dtype):
    equation = "btd,vd->btv" if tied else "btd,dv->btv"
    y = jnp.einsum(equation, x.astype(dtype), kernel, precision=matmul_precision(dtype))
    # Rounded to the model's dtype, as the forward's own logits are, then float32.
    return y.astype(jnp.float32)


def _slices(hidden, targets, start, width: int):
    x = jax.lax.dynamic_slice_in_dim(hidden, start, width, axis=1)
    y = jax.lax.dynamic_slice_in_dim(targets, start, width, axis=1)
    return x, y


def _measure(logits, y):
    """(sum of losses, number, hits), and what the gradient needs. logits (b, t, v) float32, y (b, t)."""
    keep = y != IGNORE
    safe = jnp.where(keep, y, 0)
    norm = jax.nn.logsumexp(logits, axis=-1)
    # A comparison instead of a gather: the vocabulary may be split over devices.
    here = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == safe[..., None]
    losses = norm - jnp.where(here, logits, 0).sum(-1)
    hits = (logits.argmax(-1) == safe) & keep
    return (jnp.where(keep, losses, 0).sum(), keep.sum(), hits.sum()), (keep, here, norm)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _loss(hidden, kernel, targets, width: int, tied: bool, dtype):
    def body(sums, start):
        x, y = _slices(hidden, targets, start, width)

        def measured():
            return tuple(a + b for a, b in zip(sums, _measure(_logits(x, kernel, tied, dtype), y)[0], strict=True))

        return jax.lax.cond(jnp.any(y != IGNORE), measured, lambda: sums), None

    return jax.lax.scan(body, _zero(), jnp.arange(0, hidden.shape[1], width))[0]


def _zero():
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)


def _forward(hidden, kernel, targets, width: int, tied: bool, dtype):
    return _loss(hidden, kernel, targets, width, tied, dtype), (hidden, kernel, targets)


def _backward(width: int, tied: bool, dtype, saved, cotangents):
    hidden, kernel, targets = saved
    scale, precision = cotangents[0], matmul_precision(dtype)

    def body(dkernel, start):
        x, y = _slices(hidden, targets, start, width)

        def measured(dkernel):
            logits = _logits(x, kernel, tied, dtype)
            _, (keep, here, norm) = _measure(logits, y)
            dlogits = (jnp.exp(logits - norm[..., None]) - here) * (keep * scale)[..., None]
            dlogits = dlogits.astype(dtype)
            dx = jnp.einsum("btv,vd->btd" if tied else "btv,dv->btd", dlogits, kernel, precision=precision)
            dkernel = _add_outer(dkernel, x.astype(dtype), dlogits, tied)
            return dkernel, dx.astype(hidden.dtype)

        return jax.lax.cond(jnp.any(y != IGNORE), measured, lambda dkernel: (dkernel, jnp.zeros_like(x)), dkernel)

    starts = jnp.arange(0, hidden.shape[1], width)
    dkernel, parts = jax.lax.scan(body, jnp.zeros(kernel.shape, jnp.float32), starts)
    return jnp.moveaxis(parts, 0, 1).reshape(hidden.shape), dkernel.astype(kernel.dtype), None


def _add_outer(dkernel, x, dlogits, tied: bool):
    """dkernel + the kernel's gradient, a slice of the model's width at a time.

    Where the compiler cannot add in place, the second operand of the sum would otherwise be as large as the kernel.
    """
    d, v = x.shape[-1], dlogits.shape[-1]
    pieces = next(n for n in range(1, d + 1) if n == d or (d % n == 0 and v * (d // n) * 4 <= _SLICE_BYTES))
    size, axis = d // pieces, 1 if tied else 0
    equation = "btv,btd->vd" if tied else "btd,btv->dv"

    def add(piece, dkernel):
        part = jax.lax.dynamic_slice_in_dim(x, piece * size, size, axis=2)
        operands = (dlogits, part) if tied else (part, dlogits)
        new = jnp.einsum(equation, *operands, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
        old = jax.lax.dynamic_slice_in_dim(dkernel, piece * size, size, axis)
        return jax.lax.dynamic_update_slice_in_dim(dkernel, old + new, piece * size, axis)

    return jax.lax.fori_loop(0, pieces, add, dkernel)


_loss.defvjp(_forward, _backward)
