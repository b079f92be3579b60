"""Attention to keys and values in 8 bits, as bytes: the same as attention to what they stand for, on NVIDIA's GPUs alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smolvlm_jax.attention import LayerCache, cached_attention
from smolvlm_jax.attention.forms import by_einsum
from smolvlm_jax.attention.int8_einsum import attend_bytes
from smolvlm_jax.cache import HeadBuffers


def inputs(queries, heads, dtype):
    keys = jax.random.split(jax.random.key(queries), 3)
    q, k, v = (
        jax.random.normal(key, (3, n, t, 32), dtype)
        for key, n, t in zip(keys, (queries, heads, heads), (1, 40, 40), strict=True)
    )
    seen = jnp.arange(40) < jnp.asarray([40, 7, 1])[:, None, None]
    return q, HeadBuffers.of(k, v, jnp.int8), seen


@pytest.mark.thorough
@pytest.mark.parametrize(("queries", "heads"), [(6, 2), (2, 2)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)])
def test_the_same_as_with_what_is_restored(queries, heads, dtype, tolerance):
    q, kept, seen = inputs(queries, heads, dtype)
    ours = attend_bytes(q, kept.keys, kept.key_scales, kept.values, kept.value_scales, seen)
    wanted = by_einsum(q.astype(jnp.float32), *kept.read(jnp.float32), seen)
    assert ours.dtype == dtype and np.abs(np.asarray(ours, np.float32) - wanted).max() <= tolerance


@pytest.mark.thorough
def test_where_it_is_taken():
    q, kept, seen = inputs(6, 2, jnp.bfloat16)
    new = jnp.ones((3, 2, 1, 32), jnp.bfloat16)

    def program(platform, **options):
        step = lambda q, buffers: cached_attention(q, new, new, LayerCache(buffers, jnp.asarray(3)), seen, **options)
        return jax.export.export(jax.jit(step), platforms=[platform])(q, kept).mlir_module()

    restored = "tensor<3x2x40x32xf32>"
    assert restored not in program("cuda") and restored not in program("cuda", form="einsum")
    assert all(restored in text for text in (program("cpu"), program("tpu"), program("cuda", return_weights=True)))
