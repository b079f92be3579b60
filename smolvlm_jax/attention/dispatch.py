"""`attention` and `cached_attention`, and the only place that chooses which form they take.

`FORMS` and `CACHED_FORMS` are ordered: on each platform the first form that fits the arrays is taken. The choice follows the
platform that a program is compiled for, not the process that compiles it, so that a program for TPU is the same wherever it
was lowered. All forms use grouped heads, a boolean mask and a softmax in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..errors import ConfigError
from . import forms
from .cudnn import cudnn_attention, cudnn_step, fits_cudnn, fits_cudnn_step
from .decode import decode_attention
from .decode_limits import fits_decode
from .forms import Mask
from .int8_einsum import attend_bytes
from .paged import fits_paged, paged_step
from .splash import fits_splash, splash_attention
from .trial import (
    cudnn_example,
    cudnn_step_example,
    decode_example,
    decode_int8_example,
    paged_example,
    splash_example,
    trusted,
)
from .work import WorkList

__all__ = ["Attended", "LayerCache", "attention", "cached_attention", "check_form", "pages_decode", "try_kernels"]


class Attended(NamedTuple):
    """What attention returns, and with an output of their own the layers around it.

    Attributes:
        output: (b, n, t, h) in the dtype of the queries.
        weights: (b, n, t, s) after softmax, or None if they were not asked for.
        keys_values: the updated buffers of the layer's cache, or None without a cache.
    """

    output: jax.Array
    weights: jax.Array | None = None
    keys_values: Any = None


class LayerCache(NamedTuple):
    """One layer's part of a KV cache, and where in it new columns go.

    Attributes:
        buffers: keys and values in one of the layouts of `cache`, which can be written and read.
        start: int (), the column of the first new key and value.
        work: what the decode kernel is to read; None where the cache is not laid out for it, or with more than one new column.
    """

    buffers: Any
    start: jax.Array
    work: WorkList | None = None


@dataclass(frozen=True)
class Form:
    """One way to compute attention.

    Attributes:
        name: what a model's field `attention` calls it.
        platform: the platform whose programs may take it, as jax names it; "default" for all.
        fits: whether it can compute, and is meant for, given arrays.
        run: the function itself.
        example: for a kernel, the two results that its trial compares (see `trial`).
    """

    name: str
    platform: str
    fits: Callable[..., bool]
    run: Callable[..., Any]
    example: Callable[[], tuple[jax.Array, jax.Array]] | None = None


def _by_splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    ids, causal = (mask.segment_ids, mask.causal) if isinstance(mask, forms.SegmentMask) else (None, False)
    return splash_attention(q, k, v, ids, causal=causal)


def _by_decode(q: jax.Array, k: jax.Array, v: jax.Array, cache: LayerCache, mask: Mask) -> tuple[jax.Array, Any]:
    assert cache.work is not None  # `fits_decode` saw it
    pairs, scales = cache.buffers.pairs, cache.buffers.scales
    out, pairs, scales = decode_attention(q, k, v, pairs, scales, cache.start, cache.work)
    return out, replace(cache.buffers, pairs=pairs, scales=scales)


def _fits_decode(dtype: Any) -> Callable[[jax.Array, LayerCache], bool]:
    def fits(q: jax.Array, cache: LayerCache) -> bool:
        # With work there are pairs.
        return cache.work is not None and cache.buffers.pairs.dtype == dtype and fits_decode(q, cache.work, cache.buffers.pairs)

    return fits


def _fits_pages(q: jax.Array, cache: LayerCache) -> bool:
    return hasattr(cache.buffers, "heads") and fits_paged(q, cache.buffers.heads)


def _by_pages(q: jax.Array, k: jax.Array, v: jax.Array, cache: LayerCache, mask: Mask) -> tuple[jax.Array, Any]:
    assert isinstance(mask, jax.Array)
    buffers = cache.buffers.write(k, v, cache.start)
    return paged_step(q, buffers.heads, mask), buffers


def _fits_bytes(q: jax.Array, cache: LayerCache) -> bool:
    return q.shape[2] == 1 and getattr(cache.buffers, "key_scales", None) is not None


def _by_bytes(q: jax.Array, k: jax.Array, v: jax.Array, cache: LayerCache, mask: Mask) -> tuple[jax.Array, Any]:
    buffers = cache.buffers.write(k, v, cache.start)
    return attend_bytes(q, buffers.keys, buffers.key_scales, buffers.values, buffers.value_scales, mask), buffers


# fits(q, k, mask) and run(q, k, v, mask) -> output (b, n, t, h)
FORMS = (
    Form("splash", "tpu", fits_splash, _by_splash, splash_example),
    Form("cudnn", "cuda", fits_cudnn, cudnn_attention, cudnn_example),
    Form("cudnn", "cuda", fits_cudnn_step, cudnn_step, cudnn_step_example),
    Form("one-query", "cpu", forms.fits_one_query, forms.one_query),
    Form("head-by-head", "cpu", forms.fits_head_by_head, forms.head_by_head),
    Form("einsum", "default", forms.fits_whole, forms.by_einsum),
    Form("blockwise", "default", lambda q, k, mask: True, forms.by_blocks),
)
# fits(q, cache) and run(q, k, v, cache, mask) -> output, buffers. Without one of these, the new columns are written first, and
# `attention` reads the buffers.
CACHED_FORMS = (
    Form("decode", "tpu", _fits_decode(jnp.bfloat16), _by_decode, decode_example),
    Form("decode", "tpu", _fits_decode(jnp.int8), _by_decode, decode_int8_example),
    Form("cudnn", "cuda", _fits_pages, _by_pages, paged_example),
    Form("einsum", "cuda", _fits_bytes, _by_bytes),
)


def pages_decode(length: int, size: int, dtype: Any) -> bool:
    """Whether NVIDIA's GPUs take a decode step with keys and values in one array, of `length` columns and heads of `size`."""
    shape = lambda heads, columns: jax.ShapeDtypeStruct((1, heads, columns, size), dtype)
    fits: Any = fits_paged
    return fits(shape(1, 1), shape(2, length)) and trusted(paged_example)


def check_form(name: str) -> None:
    """Raise ConfigError unless `name` is "auto" or the name of a form."""
    names = tuple(dict.fromkeys(("auto", *(form.name for form in (*CACHED_FORMS, *FORMS)))))
    if name not in names:
        raise ConfigError(f"attention {name!r} is none of {', '.join(names)}")


def try_kernels(form: str = "auto") -> None:
    """Run the trials of the kernels that `form` admits, so that tracing a program finds their verdicts.

    Does nothing in a process without a TPU or GPU, and nothing the second time. Warns of each kernel that will not be used.
    """
    check_form(form)
    for kernel in (*CACHED_FORMS, *FORMS):
        if kernel.example is not None and form in ("auto", kernel.name):
            trusted(kernel.example)


def _choose(ordered: tuple[Form, ...], name: str, *inputs: Any) -> dict[str, Callable[..., Any]]:
    """For each platform the first form that fits: the form `name` and those for all platforms, or with "auto" all forms."""
    check_form(name)
    if name != "auto":
        ordered = tuple(sorted((f for f in ordered if name == f.name or f.platform == "default"), key=lambda f: f.name != name))
    chosen: dict[str, Callable[..., Any]] = {}
    for form in ordered:
        if form.fits(*inputs) and (form.example is None or trusted(form.example)):
            chosen.setdefault(form.platform, form.run)
    return chosen


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = None, *, form: str = "auto", return_weights: bool = False
) -> Attended:
    """Scaled dot-product attention.

    Scores and softmax are float32. A masked score becomes the lowest finite float32, not -inf: a query that may see no key
    (padding) gets finite values, which are not read.

    Args:
        q: queries (b, n, t, h).
        k: keys (b, k, s, h) with n a multiple of k: query head j reads key/value head j // (n / k).
        v: values (b, k, s, h).
        mask: bool, broadcastable to (b, t, s), True where a query may look; or a SegmentMask; or None.
        form: "auto", or the name of the form to use wherever it fits. Where it does not: "einsum", and "blockwise" for
            long rows.
        return_weights: also return the weights. They are those of the einsums, whatever `form` says.

    Raises:
        ConfigError: if no form has that name.
    """
    if return_weights:
        return Attended(*forms.einsum_and_weights(q, k, v, mask))
    chosen = _choose(FORMS, form, q, k, mask)
    if len(chosen) == 1:
        return Attended(chosen["default"](q, k, v, mask))
    return Attended(jax.lax.platform_dependent(q, k, v, mask, **chosen))


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: LayerCache,
    mask: Mask,
    *,
    form: str = "auto",
    return_weights: bool = False,
) -> Attended:
    """Write new columns into a layer's cache, and attend to all columns that it holds.

    Args:
        q: queries (b, n, t, h).
        k: new keys (b, k, t, h).
        v: new values (b, k, t, h).
        cache: the layer's buffers, and the column that the first new key and value go to.
        mask: bool (b, t, L) over the columns of the cache, as `KVCache.advance` returns it.
        form: as in `attention`.
        return_weights: as in `attention`; the weights are (b, n, t, L).

    Raises:
        ConfigError: if no form has that name.
    """

    def plain(q, k, v, cache, mask):
        buffers = cache.buffers.write(k, v, cache.start)
        keys, values = buffers.read(q.dtype)
        found = attention(q, keys, values, mask, form=form, return_weights=return_weights)
        return found._replace(keys_values=buffers)

    def by_kernel(run, q, k, v, cache, mask):
        output, buffers = run(q, k, v, cache, mask)
        return Attended(output, keys_values=buffers)

    inputs = (q, k, v, cache, mask)
    chosen = {} if return_weights else _choose(CACHED_FORMS, form, q, cache)
    if not chosen:
        return plain(*inputs)
    kernels = {platform: partial(by_kernel, run) for platform, run in chosen.items()}
    return jax.lax.platform_dependent(*inputs, **kernels, default=plain)
