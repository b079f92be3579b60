"""The decode kernel for TPUs: the plain form's output and cache, for any visible columns, on a mesh too; where it is taken.

Here it runs in the interpreter that simulates a chip: memory holds NaN before it is written, copies happen as late as they
may, and bounds are watched. The TPU compiler sees it in tests/engine/test_tpu_programs.py.
"""

import os
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu

from smolvlm_jax import load, make_mesh
from smolvlm_jax.attention import decode as module
from smolvlm_jax.attention import decode_limits, dispatch
from smolvlm_jax.attention import trial as kernels
from smolvlm_jax.attention.decode_limits import fits_decode
from smolvlm_jax.attention.dispatch import LayerCache, cached_attention
from smolvlm_jax.attention.forms import by_einsum
from smolvlm_jax.cache import ColumnBuffers, HeadBuffers
from smolvlm_jax.errors import ConfigError
from smolvlm_jax.sharding import activate

CHIP = tpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait")
EAGER = tpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="eager")
kernel = partial(module.decode_attention, interpret=CHIP)

# rows, query heads, key/value heads, columns, head size
SHAPES = {
    "256M": (8, 9, 3, 512, 64),
    "500M": (4, 15, 5, 256, 64),
    "2.2B, whose heads stand alone": (3, 32, 32, 256, 64),
    "more queries than a tile has rows": (4, 20, 2, 128, 32),
    "heads as wide as a tile": (3, 4, 2, 200, 128),
}


def make(b, n, kv, length, h, lives, start, *, dtype=jnp.bfloat16, shards=1, seed=0):
    """New queries, keys and values; a layer whose hidden columns hold NaN; how much each row sees."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    live = np.resize(lives, b)
    seen = (start - np.arange(length)) % length < live[:, None]
    bf16 = lambda x: jnp.asarray(x, jnp.bfloat16)
    hide = lambda x: np.where(seen[:, None, :, None], x, np.nan)
    buffers = ColumnBuffers.of(bf16(hide(draw(b, kv, length, h))), bf16(hide(draw(b, kv, length, h))), dtype, shards)
    new = bf16(draw(b, n, 1, h)), bf16(draw(b, kv, 1, h)), bf16(draw(b, kv, 1, h))
    return new, buffers, jnp.asarray(live, jnp.int32), jnp.asarray(seen)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES.values() if shape[3] % 128 == 0])
def test_it_is_translated_for_tpus(shape, dtype):
    """The interpreter takes what Mosaic does not. Nothing is compiled."""
    new, buffers, live, _ = make(*shape, [40], 7, dtype=dtype)
    step = jax.jit(
        lambda new, buffers, live: module.decode_attention(
            *new, buffers.pairs, buffers.scales, jnp.asarray(7), buffers.work(live, jnp.asarray(7))
        )
    )
    assert "decode_attention" in step.trace(new, buffers, live).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize(("n", "kv", "most"), [(9, 3, 256), (15, 5, 256), (32, 32, 64)])
def test_as_many_rows_as_an_engine_has_slots_fit(n, kv, most, dtype):
    shape = lambda *dims, of=jnp.bfloat16: jax.ShapeDtypeStruct(dims, of)
    pairs = lambda rows: shape(rows, 1, 256, 2 * kv * 64, of=dtype)
    fits = lambda rows: fits_decode(shape(rows, n, 1, 64), work(rows), pairs(rows))
    work = lambda rows: jax.eval_shape(
        ColumnBuffers(pairs(rows), None, 64).work, shape(rows, of=jnp.int32), shape(of=jnp.int32)
    )
    assert fits(most) and not fits(16 * most)


def compare(shape, lives, start, run=kernel, *, dtype=jnp.bfloat16, seed=0):
    """The kernel beside the plain form in float32: its output, and every visible column of what it leaves."""
    new, buffers, live, seen = make(*shape, lives, start, dtype=dtype, seed=seed)
    at = jnp.asarray(start)

    @jax.jit
    def ours(new, buffers, live):
        return run(*new, buffers.pairs, buffers.scales, at, buffers.work(live, at))

    out, pairs, scales = ours(new, buffers, live)
    after = buffers.write(*new[1:], at)
    keys, values = (jnp.where(seen[:, None, :, None], x, 0) for x in after.read(jnp.float32))
    exact = kernels._plain(new[0], keys, values, seen[:, None])
    exact = np.where(np.asarray(live)[:, None, None, None] > 0, exact, 0)
    size = lambda x: np.sqrt((np.asarray(x, np.float32) ** 2).sum((1, 2, 3)))
    distance = size(np.asarray(out, np.float32) - exact)
    assert (distance <= 0.008 * size(exact)).all(), distance / size(exact)
    # All rows together: as near as the einsums in bfloat16 of the same cache.
    expected = by_einsum(new[0], keys.astype(jnp.bfloat16), values.astype(jnp.bfloat16), seen[:, None])
    expected = np.where(np.asarray(live)[:, None, None, None] > 0, np.asarray(expected, np.float32), 0)
    error = lambda x: np.linalg.norm(np.asarray(x, np.float32) - exact)
    assert error(out) <= max(0.004 * np.linalg.norm(exact), 1.5 * error(expected))  # 0 where no row takes part
    ours = replace(buffers, pairs=pairs, scales=scales).read(jnp.float32)
    hide = lambda x: np.where(np.asarray(seen)[:, None, :, None], x, 0)
    # Of int8 a number that lies between two may be rounded to either: sums of the rotation have another order.
    between = 0 if scales is None else float(np.nanmax(np.where(np.asarray(seen)[:, None, None], scales, 0)))
    for found, wanted in zip(ours, after.read(jnp.float32), strict=True):
        assert np.abs(hide(found) - hide(wanted)).max() <= between


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("start", [200, pytest.param(0, marks=pytest.mark.slow), pytest.param(511, marks=pytest.mark.slow)])
def test_any_part_of_a_ring(start, dtype):
    """Rows that see nothing, the new column alone, parts that end and begin within tiles, parts across the ring's end, all."""
    compare(SHAPES["256M"], [0, 1, 512, 511, 9, 120, 300, 481], start, dtype=dtype, seed=start)


def test_a_small_ring():
    compare((3, 4, 2, 128, 32), [0, 128, 30], 77)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("name", list(SHAPES)[1:])
def test_other_shapes(name, dtype):
    shape = SHAPES[name]
    if dtype == jnp.int8 and shape[3] % 128:
        shape = (*shape[:3], 256, shape[4])
    compare(shape, [shape[3], 0, 77, 130], 77, dtype=dtype)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("name", list(SHAPES))
def test_lowered_for_a_chip(name, dtype):
    """What the interpreter takes and a chip's kernels do not, such as arrays without elements."""
    b, n, kv, _, h = SHAPES[name]
    new, buffers, live, _ = make(b, n, kv, 256, h, [256, 0, 77, 130], 77, dtype=dtype)
    at = jnp.asarray(77)
    run = lambda new, buffers, live: module.decode_attention(*new, buffers.pairs, buffers.scales, at, buffers.work(live, at))
    exported = jax.export.export(jax.jit(run), platforms=["tpu"], disabled_checks=())
    assert "tpu_custom_call" in exported(new, buffers, live).mlir_module()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_random_rings(dtype, monkeypatch):
    """Many small rings in chunks of 128 columns, with more rows than columns can be under way, whenever copies happen."""
    monkeypatch.setattr(decode_limits, "_MOST_COLUMNS", 128)
    rng = np.random.default_rng(0)
    for seed in range(4):
        length = 128 * int(rng.integers(1, 5))
        run = partial(module.decode_attention, interpret=EAGER if seed % 2 else CHIP)
        compare((12, 6, 2, length, 32), rng.integers(0, length + 1, 12), int(rng.integers(length)), run, dtype=dtype, seed=seed)
    compare((5, 6, 2, 256, 32), [0], 3, dtype=dtype)


@pytest.mark.thorough
def test_a_row_with_nan_does_not_reach_the_others():
    shape = (3, 6, 2, 256, 32)
    new, buffers, live, _ = make(*shape, [256, 40, 256], 100)
    at = jnp.asarray(100)
    run = lambda buffers: kernel(*new, buffers.pairs, None, at, buffers.work(live, at))[0]
    out, broken = run(buffers), run(replace(buffers, pairs=buffers.pairs.at[0].set(jnp.nan)))
    assert np.isnan(np.asarray(broken[0], np.float32)).all()
    np.testing.assert_array_equal(np.asarray(out[1:], np.float32), np.asarray(broken[1:], np.float32))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.int8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("shape", [(1, 1, 2), pytest.param((2, 1, 1), marks=pytest.mark.slow)])
def test_on_a_mesh(shape, dtype):
    """Rows or heads that divide, each shard with a buffer of its own: what one device computes.

    Two devices, since the simulated ones wait for each other, each in a thread of a pool that has one for every core.
    """
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two cores are needed")
    heads, split = 4, shape[2] if 4 % shape[2] == 0 else 1
    alone, together = (make(8, 8, heads, 128, 64, [0, 5, 128, 70], 5, dtype=dtype, shards=n) for n in (1, split))
    at = jnp.asarray(5)

    @jax.jit
    def run(new, buffers, live):
        out, pairs, scales = kernel(*new, buffers.pairs, buffers.scales, at, buffers.work(live, at))
        return out, *replace(buffers, pairs=pairs, scales=scales).read(jnp.float32)

    expected = run(*alone[:3])
    with activate(make_mesh(*shape, devices=jax.devices()[:2])):
        found = run(*together[:3])
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32))


def lowered(platform, dtype=jnp.bfloat16, t=1, length=256, kept=None, layout=ColumnBuffers, rows=2, **options) -> str:
    shape = lambda n, t: jax.ShapeDtypeStruct((rows, n, t, 64), dtype)
    kept = kept or dtype
    make = partial(ColumnBuffers.of, dtype=kept, shards=1) if layout is ColumnBuffers else partial(HeadBuffers.of, dtype=kept)
    buffers = jax.eval_shape(make, shape(3, length), shape(3, length))
    mask = jax.ShapeDtypeStruct((rows, t, length), bool)

    def step(q, k, v, buffers, mask, start):
        work = buffers.work(jnp.full(rows, 5), start) if layout is ColumnBuffers and t == 1 else None
        found = cached_attention(q, k, v, LayerCache(buffers, start, work), mask, **options)
        return found.output, found.keys_values

    exported = jax.export.export(jax.jit(step), platforms=[platform])
    inputs = shape(9, t), shape(3, t), shape(3, t), buffers, mask, jax.ShapeDtypeStruct((), jnp.int32)
    return exported(*jax.tree.leaves(inputs[:3]), *inputs[3:]).mlir_module()


def test_taken_on_tpu_in_bfloat16_and_nowhere_else(monkeypatch):
    used = lambda *arguments, **options: "tpu_custom_call" in lowered(*arguments, **options)
    monkeypatch.setattr(jax.export, "export", partial(jax.export.export, disabled_checks=()))
    assert used("tpu") and used("tpu", length=8192) and used("tpu", kept=jnp.int8)
    assert not used("tpu", layout=HeadBuffers), "whose columns may have gaps"
    assert not used("tpu", t=2), "several queries"
    assert not used("tpu", length=204), "columns that are no whole tiles"
    assert not used("tpu", kept=jnp.int8, length=200), "nor of the scales"
    assert not used("tpu", rows=2048), "more rows than the core's memory holds"
    assert not used("tpu", dtype=jnp.float32), "exact"
    assert not used("tpu", kept=jnp.float32), "a cache of another type"
    assert not used("tpu", return_weights=True)
    assert not used("cuda") and not used("cpu")
    assert used("tpu", form="decode") and used("tpu", form="decode", kept=jnp.int8)
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
    cached = [kernels.decode_example, kernels.decode_int8_example, kernels.paged_example]
    assert tried == [*cached, kernels.splash_example, kernels.cudnn_example, kernels.cudnn_step_example]
    load("tiny", attention="einsum")
    assert len(tried) == 6
    with pytest.raises(ConfigError, match="attention 'fused' is none of auto, decode, cudnn, einsum, splash"):
        load("tiny", attention="fused")


@pytest.mark.thorough
def test_the_examples_agree_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "decode_attention", kernel)
    monkeypatch.setattr(kernels, "splash_attention", partial(kernels.splash_attention, interpret=True))
    for example in (kernels.decode_example, kernels.decode_int8_example, kernels.splash_example):
        assert kernels._fault(example) is None
    for fault in (
        lambda q, k, v, *kept: (q * 0, *kernel(q, k, v, *kept)[1:]),
        lambda q, k, v, pairs, scales, *rest: (kernel(q, k, v, pairs, scales, *rest)[0], pairs, scales),
    ):
        monkeypatch.setattr(kernels, "decode_attention", fault)
        for example in (kernels.decode_example, kernels.decode_int8_example):
            assert "is wrong" in kernels._fault(example), "an output that is zero; a cache that was not written"
