"""`KVCache`: its layouts hold the same, whatever is written, inserted and stored how; which one is chosen where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smolvlm_jax import generate, make_mesh, published_config
from smolvlm_jax.attention import cudnn, dispatch
from smolvlm_jax.attention.int8 import dequantize, quantize, rounded, turn
from smolvlm_jax.cache import CacheFormat, ColumnBuffers, HeadBuffers, KVCache, PairBuffers
from smolvlm_jax.engine import EngineConfig
from smolvlm_jax.errors import InputError

TEXT = published_config("SmolVLM-256M-Instruct").text_config
SMALL = TEXT.replace(num_hidden_layers=2, num_key_value_heads=4, num_attention_heads=4, head_dim=32)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    ("layout", "stored"),
    [
        (PairBuffers, CacheFormat(jnp.dtype(jnp.float32), paired=True)),
        *((ColumnBuffers, CacheFormat(jnp.dtype(dtype), shards)) for dtype in (jnp.float32, jnp.int8) for shards in (1, 2)),
    ],
)
def test_all_layouts_hold_the_same(layout, stored):
    """A prompt, a prompt put into another row across the ring's end, columns written until the ring has come round."""
    length = 16
    prompt = [(draw(3, 4, 5, 32), draw(3, 4, 5, 32) + i) for i in range(2)]
    start = KVCache.from_prompt(prompt, jnp.ones((3, 5), bool), 8)
    ours, theirs = (start.stored_as(form, length) for form in (stored, CacheFormat(stored.dtype)))
    assert isinstance(ours.layers[0], layout) and isinstance(theirs.layers[0], HeadBuffers)
    packed = [HeadBuffers(draw(1, 4, 20, 32), draw(1, 4, 20, 32) - i) for i in range(2)]

    def through(cache):
        for row, wanted in ((1, True), (0, False)):
            cache = cache.insert(jnp.asarray(row), packed, jnp.asarray(6), jnp.asarray(9), wanted=jnp.asarray(wanted))
        new = draw(3, 4, 1, 32), draw(3, 4, 1, 32) * 2
        for _ in range(13):
            after, mask, layers = cache.advance(jnp.asarray([[True], [True], [False]]))
            buffers = tuple(layer.buffers.write(*new, layer.start) for layer in layers)
            cache = KVCache(buffers, after.visible, after.index)
        return cache.visible, mask, [layer.read(jnp.float32) for layer in cache.layers]

    for a, b in zip(jax.tree.leaves(jax.jit(through)(ours)), jax.tree.leaves(jax.jit(through)(theirs)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_int8_is_as_near_as_eight_bits_allow():
    x = draw(7, 5, 32) * jnp.asarray([0, 1e-30, 1e-3, 1, 1e3, 1e30, 1])[:, None, None]
    kept, scale = rounded(x)
    assert kept.dtype == jnp.int8 and scale.shape == (7, 5, 1)
    assert (np.abs(kept * scale - x) <= 0.5001 * scale).all() and (kept.max(-1) <= 127).all()
    for size in (24, 64, 80, 96, 128):  # also where the matrix is one of blocks
        y = draw(9, size).at[:, 3].mul(20)  # an outlier in every vector
        assert np.abs(turn(turn(y)) - y).max() <= 1e-4
        kept, scale = rounded(y)
        ours, plainly = (float(jnp.linalg.norm((z - y)[:, 8:16])) for z in (dequantize(*quantize(y)), kept * scale))
        assert ours <= plainly


def test_which_layout_is_chosen(monkeypatch):
    choose = lambda length=2048, dtype=jnp.bfloat16, text=TEXT, **more: CacheFormat.choose(text, length, dtype, **more)
    assert choose().shards is None, "on this platform"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert choose() == CacheFormat(jnp.dtype(jnp.bfloat16), 1)
    assert choose(quantized=True) == CacheFormat(jnp.dtype(jnp.int8), 1)
    assert choose(dtype=jnp.float32).shards is None
    assert choose(100).shards is None and choose(200).shards == 1 and choose(200, quantized=True).shards is None
    assert choose(text=TEXT.replace(head_dim=24)).shards is None
    assert choose(mesh=make_mesh(data=-1)).shards is None, "the mesh's devices count"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose() == CacheFormat(jnp.dtype(jnp.bfloat16)), "not without jax's CUDA plugin"
    monkeypatch.setattr(cudnn, "_installed", lambda: True)
    monkeypatch.setattr(dispatch, "trusted", lambda example: True)
    assert choose() == CacheFormat(jnp.dtype(jnp.bfloat16), paired=True)
    assert not any(x.paired for x in (choose(200), choose(quantized=True), choose(dtype=jnp.float32)))
    monkeypatch.setattr(dispatch, "trusted", lambda example: False)
    assert not choose().paired, "a kernel that fails its trial"


def test_sizes_and_names():
    half, small = (CacheFormat(jnp.dtype(x)).column_bytes(TEXT) for x in (jnp.bfloat16, jnp.int8))
    assert half == 2 * 30 * 3 * 64 * 2 and small == 2 * 30 * 3 * (64 + 4)


def test_generate_and_engine_take_int8(tiny_a):
    """Tokens of float32 and int8 caches: nearly always the same, and the setting is used or refused by name."""
    options = {"max_new_tokens": 12, "eos_token_id": None, "pixel_values": tiny_a.pixels}
    run = lambda **more: generate(tiny_a.model, tiny_a.params, tiny_a.ids, np.ones_like(tiny_a.ids), **options, **more)
    assert (run() == run(kv_cache_dtype="int8")).mean() > 0.8
    with pytest.raises(InputError, match="kv_cache_dtype is 'int8'"):
        run(kv_cache_dtype="int4")
    shapes = [EngineConfig(kv_cache_dtype=d, cache_bytes=2**20).resolve(tiny_a.model, None).slots for d in (None, "int8")]
    assert sum(shapes[1]) > sum(shapes[0]), "the same memory holds more rows"
    with pytest.raises(InputError, match="kv_cache_dtype is 'int8'"):
        EngineConfig(kv_cache_dtype="fp8").resolve(tiny_a.model, None)
