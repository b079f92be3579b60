"""The decode kernel for TPUs: the einsums' output, the same cache to the bit, on a mesh too, and taken only where it is meant.

Here it runs in the interpreter; the TPU compiler sees it in tests/engine/test_tpu_programs.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import fast_first

from smolvlm_jax import decoder, load, make_mesh
from smolvlm_jax.attention import decode as module
from smolvlm_jax.attention import dispatch
from smolvlm_jax.attention import trial as kernels
from smolvlm_jax.attention.dispatch import Attended, LayerCache, attention, cached_attention, write_columns
from smolvlm_jax.cache import KVCache
from smolvlm_jax.errors import ConfigError
from smolvlm_jax.sharding import activate

kernel = partial(module.decode_attention, interpret=True)

# rows, query heads, key/value heads, columns, head size
SHAPES = {
    "256M": (4, 9, 3, 256, 64),
    "500M": (3, 15, 5, 128, 64),
    "2.2B, whose heads stand alone": (2, 4, 4, 384, 64),
    "more queries than a tile has rows": (2, 14, 2, 128, 32),
}


def make(b, n, kv, length, h, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    new = draw(b, n, 1, h), draw(b, kv, 1, h), draw(b, kv, 1, h)
    return new, (draw(b, kv, length, h), draw(b, kv, length, h)), jnp.asarray(rng.random((b, 1, length)) > 0.4)


def plain(q, k, v, keys, values, mask, start, dtype=jnp.bfloat16):
    keys, values = write_columns(keys, k, start), write_columns(values, v, start)
    out = attention(*(x.astype(dtype) for x in (q, keys, values)), mask, return_weights=True).output
    return out, keys, values


def error(out, inputs) -> float:
    exact = plain(*inputs, dtype=jnp.float32)[0]
    return float(jnp.linalg.norm(out.astype(jnp.float32) - exact) / jnp.linalg.norm(exact))


@pytest.mark.parametrize("name", fast_first(1, SHAPES))
@pytest.mark.parametrize("block", fast_first(1, [module._BLOCK, 1]))
def test_as_near_to_float32_as_the_einsums(name, block, monkeypatch):
    """At every kind of place: the ends of the ring, of a tile, in the middle. In one block, and a head of a row at a time."""
    monkeypatch.setattr(module, "_BLOCK", block)
    shape = SHAPES[name]
    length = shape[3]
    for start in (0, 77, 127, 128 % length, length - 1):
        new, cache, mask = make(*shape, seed=start)
        inputs = (*new, *cache, mask, jnp.asarray(start))
        out, keys, values = jax.jit(kernel)(*inputs)
        expected, *buffers = plain(*inputs)
        assert out.dtype == jnp.bfloat16 and out.shape == expected.shape
        assert error(out, inputs) <= max(0.004, 1.5 * error(expected, inputs))
        for ours, theirs in zip((keys, values), buffers, strict=True):
            np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


@pytest.mark.thorough
def test_as_a_chip_would_run_it(monkeypatch):
    """The interpreter that copies blocks as a chip does, late, into memory that holds NaN before, and watches the bounds."""
    from jax.experimental.pallas import tpu

    monkeypatch.setattr(module, "_BLOCK", 2 * 2 * 64 * 256)  # four steps of the grid
    params = tpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait")
    new, cache, mask = make(4, 9, 3, 256, 64)
    inputs = (*new, *cache, mask, jnp.asarray(200))
    out, *buffers = jax.jit(partial(module.decode_attention, interpret=params))(*inputs)
    expected, *theirs = plain(*inputs)
    assert error(out, inputs) <= 1.5 * error(expected, inputs)
    for ours, wanted in zip(buffers, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(wanted, np.float32))


def test_what_is_hidden_does_not_matter():
    """Neither values of hidden columns, nor what stood where the new column goes; a new column may be hidden itself; and a row
    that sees nothing stays finite."""
    (q, k, v), (keys, values), mask = make(4, 6, 2, 256, 64)
    start = jnp.asarray(130)
    mask = mask.at[:, :, 130].set(jnp.asarray([True, True, False, True])[:, None]).at[3].set(False)
    noise = jnp.asarray(np.random.default_rng(1).standard_normal(keys.shape) * 50, jnp.bfloat16)
    hidden = ~mask[:, 0].at[:, 130].set(False)[:, None, :, None]
    out = kernel(q, k, v, keys, values, mask, start)[0]
    other = kernel(q, k, v, jnp.where(hidden, noise, keys), jnp.where(hidden, noise, values), mask, start)[0]
    np.testing.assert_array_equal(np.asarray(out[:3], np.float32), np.asarray(other[:3], np.float32))
    assert np.isfinite(np.asarray(other, np.float32)).all()


@pytest.mark.parametrize("shape", fast_first(1, [(2, 2, 2), (8, 1, 1), (1, 2, 4)]))
def test_on_a_mesh(shape):
    """Rows and heads that divide and ones that do not: what one device computes."""
    if len(jax.devices()) < 8:
        pytest.skip("eight devices are needed")
    new, cache, mask = make(8, 6, 2, 128, 64)
    run = jax.jit(kernel)
    inputs = (*new, *cache, mask, jnp.asarray(5))
    alone = run(*inputs)
    with activate(make_mesh(*shape)):
        together = run(*inputs)
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


def test_a_model_that_decodes_with_it(tiny_a, monkeypatch):
    """Forty steps through a ring of 128 columns, past its end: logits as near to float32's as without the kernel."""
    model = lambda dtype: type(tiny_a.model)(tiny_a.model.config, dtype=dtype)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.integers(1, 90, (3, 40)))

    def run(dtype):
        cache = KVCache.create(tiny_a.model.config.text_config, 3, 128, dtype)
        cache = cache.__class__(cache.keys, cache.values, cache.visible, jnp.asarray(110))
        params = jax.tree.map(lambda x: x.astype(dtype), tiny_a.params)

        @jax.jit
        def step(params, cache, token, position):
            out = model(dtype).apply(
                {"params": params}, input_ids=token, position_ids=position[None, None], past_key_values=cache
            )
            return out.past_key_values, out.logits[:, -1].astype(jnp.float32)

        found = []
        for i in range(ids.shape[1]):
            cache, logits = step(params, cache, ids[:, i : i + 1], jnp.asarray(i))
            found.append(logits)
        return np.asarray(jnp.stack(found))

    exact, without = run(jnp.float32), run(jnp.bfloat16)
    taken = []

    def with_kernel(q, k, v, cache, mask, **_):
        taken.append(cache)
        out, keys, values = kernel(q, k, v, cache.keys, cache.values, mask, cache.start)
        return Attended(out, keys_values=(keys, values))

    monkeypatch.setattr(decoder, "cached_attention", with_kernel)
    ours = run(jnp.bfloat16)
    layers = tiny_a.model.config.text_config.num_hidden_layers
    assert len(taken) == len({id(cache.keys) for cache in taken}) == layers, "each layer its own buffers"
    assert np.linalg.norm(ours - exact) <= 1.5 * np.linalg.norm(without - exact)


def lowered(platform, dtype=jnp.bfloat16, t=1, length=256, size=64, kept=None, **options) -> str:
    shape = lambda n, t, dtype=dtype: jax.ShapeDtypeStruct((2, n, t, size), dtype)
    cache = shape(3, length, kept or dtype)
    mask = jax.ShapeDtypeStruct((2, t, length), bool)

    def step(q, k, v, keys, values, mask, start):
        found = cached_attention(q, k, v, LayerCache(keys, values, start), mask, **options)
        return found.output, found.keys_values

    exported = jax.export.export(jax.jit(step), platforms=[platform])
    inputs = shape(9, t), shape(3, t), shape(3, t), cache, cache, mask, jax.ShapeDtypeStruct((), jnp.int32)
    return exported(*inputs).mlir_module()


def test_taken_on_tpu_in_bfloat16_and_nowhere_else():
    used = lambda *arguments, **options: "tpu_custom_call" in lowered(*arguments, **options)
    assert used("tpu") and used("tpu", length=8192)
    assert not used("tpu", t=2), "several queries"
    assert not used("tpu", length=200), "columns that are no whole tiles"
    assert not used("tpu", length=2**15), "more columns than the core's memory holds"
    assert not used("tpu", dtype=jnp.float32), "exact"
    assert not used("tpu", kept=jnp.float32), "a cache of another type"
    assert not used("tpu", return_weights=True)
    assert not used("cuda") and not used("cpu")
    assert used("tpu", form="decode")
    for form in ("einsum", "blockwise", "splash"):
        assert not used("tpu", form=form), "another form is asked for"


def right():
    return jnp.ones(3), jnp.ones(3) * 1.001


def wrong():
    return jnp.ones(3), jnp.asarray([1.0, 1.0, 1.2])


def nothing():
    return jnp.full(3, jnp.nan), jnp.ones(3)


def broken():
    raise RuntimeError("Mosaic failed to compile TPU kernel")


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_a_kernel_is_tried_before_it_is_trusted(monkeypatch, backend, recwarn):
    """In the middle of tracing a program on a mesh, as it happens; without a TPU nothing can be tried."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    kernels.trusted.cache_clear()
    for example, reason in ((right, None), (wrong, "is wrong"), (nothing, "is wrong"), (broken, "Mosaic failed")):
        found = []
        with activate(make_mesh(data=-1)):
            jax.jit(lambda x, example=example, found=found: found.append(kernels.trusted(example)) or x).lower(1.0)
        assert found == [reason is None or backend == "cpu"]
        said = [str(w.message) for w in recwarn.list]
        recwarn.clear()
        assert not said if found[0] else len(said) == 1 and reason in said[0] and example.__name__ in said[0]
    kernels.trusted.cache_clear()


def test_loading_tries_the_kernels_that_the_model_may_use(monkeypatch):
    tried = []
    monkeypatch.setattr(dispatch, "trusted", tried.append)
    load("tiny")
    assert tried == [kernels.decode_example, kernels.splash_example]
    load("tiny", attention="einsum")
    assert len(tried) == 2
    with pytest.raises(ConfigError, match="attention 'fused' is none of auto, decode"):
        load("tiny", attention="fused")


@pytest.mark.thorough
def test_the_examples_agree_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "decode_attention", kernel)
    monkeypatch.setattr(kernels, "splash_attention", partial(kernels.splash_attention, interpret=True))
    assert kernels._fault(kernels.decode_example) is None and kernels._fault(kernels.splash_example) is None
    monkeypatch.setattr(kernels, "decode_attention", lambda q, k, v, keys, values, *rest: (q * 0, keys, values))
    assert "is wrong" in kernels._fault(kernels.decode_example)
    monkeypatch.setattr(kernels, "decode_attention", lambda *inputs: (kernel(*inputs)[0], *inputs[3:5]))
    assert "is wrong" in kernels._fault(kernels.decode_example), "a cache that was not written"
