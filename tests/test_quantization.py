"""Weights in 8 bits: what they stand for, and that every use of a model computes with exactly that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolvlm_jax import make_mesh
from smolvlm_jax.parameters import (
    abstract_params,
    flatten_params,
    logical_axes,
    quantize_params,
    spanned_dimensions,
    with_scales,
)
from smolvlm_jax.quantization import SCALE, dequantize, dequantized, is_quantized, quantize, scale_for, values_at
from smolvlm_jax.sharding import activate, parameter_shardings


def _close(found, wanted, tolerance=2e-5):
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-999, 999), st.integers(-150, 117)), min_size=6, max_size=6),
    st.sampled_from([(0,), (1,), (0, 1)]),
)
def test_values_times_scale_are_within_half_a_scale(numbers, spanned):
    """Of numbers of any size, zero and subnormal ones included, the same in jax and numpy."""
    x = np.asarray([np.ldexp(number, power) for number, power in numbers], np.float32).reshape(2, 3)
    scale = scale_for(np.abs(x).max(spanned, keepdims=True), np)
    values = values_at(x, scale, np)
    assert values.dtype == np.int8 and np.isfinite(scale).all() and (scale > 0).all()
    gap = np.abs(dequantize(values, scale).astype(np.float64) - x)
    assert (gap <= 0.5001 * scale.astype(np.float64)).all() or np.abs(x).max() < 2e-36
    ours, of_jax = jax.jit(quantize, static_argnums=1)(jnp.asarray(x), spanned)
    np.testing.assert_allclose(of_jax, scale, rtol=1e-6)
    assert np.abs(np.asarray(ours, np.int32) - values).max() <= 1, "a number between two may be rounded to either"


@pytest.mark.thorough
def test_the_tree_is_described_as_it_is(tiny_a):
    ours = quantize_params(tiny_a.model, tiny_a.params)
    described = with_scales(tiny_a.model, abstract_params(tiny_a.model))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), ours) == jax.tree.map(lambda x: (x.shape, x.dtype), described)
    assert jax.tree.structure(with_scales(tiny_a.model, logical_axes(tiny_a.model))) == jax.tree.structure(ours)
    assert is_quantized(ours) and not is_quantized(tiny_a.params) and not is_quantized(dequantized(ours))
    assert jax.tree.structure(dequantized(ours)) == jax.tree.structure(tiny_a.params)
    again = quantize_params(tiny_a.model, ours)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(ours), strict=True))
    for path, x in flatten_params(ours).items():
        kept = not path.endswith(SCALE) and path not in spanned_dimensions(tiny_a.model)
        assert not kept or x is flatten_params(tiny_a.params)[path], f"{path} is as it was"


@pytest.mark.thorough
def test_a_model_computes_with_what_the_weights_stand_for(tiny_a):
    """Logits, image features and the cache, with a gradient through them, equal those of the dequantized tree."""
    ours = quantize_params(tiny_a.model, tiny_a.params)
    plain = dequantized(ours)

    def run(params):
        return tiny_a.model.apply({"params": params}, input_ids=tiny_a.ids, pixel_values=tiny_a.pixels, use_cache=True)

    for found, wanted in zip(*(jax.tree.leaves(jax.jit(run)(params)) for params in (ours, plain)), strict=True):
        _close(found, wanted)


@pytest.mark.thorough
def test_on_a_mesh_as_on_one_device(tiny_a):
    """Values and scales are divided as their parameter is; columns that are divided take their scales along."""
    ours = quantize_params(tiny_a.model, tiny_a.params)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    axes = with_scales(tiny_a.model, logical_axes(tiny_a.model))
    placed = jax.device_put(ours, parameter_shardings(ours, axes, mesh))
    gate = placed["model"]["text_model"]["layers_0"]["mlp"]["gate_proj"]
    width = gate["kernel"].shape[1]
    assert gate["kernel_scale"].sharding.shard_shape(gate["kernel_scale"].shape) == (1, width // 2)

    def run(params):
        return tiny_a.model.apply({"params": params}, input_ids=tiny_a.ids, pixel_values=tiny_a.pixels).logits

    with activate(mesh):
        found = jax.jit(run)(placed)
    _close(found, run(dequantized(ours)), 1e-4)


def test_a_table_in_8_bits():
    """Rows are looked up, and multiplied as a tied output head, as what they stand for."""
    from smolvlm_jax.layers import Embedding
    from smolvlm_jax.sharding import Dimension

    table = jax.random.normal(jax.random.key(0), (40, 16))
    values, scale = quantize(table, (1,))
    module, ours = Embedding(Dimension(40), Dimension(16)), {"embedding": values, f"embedding{SCALE}": scale}
    ids, x = jnp.asarray([[3, 39]]), jax.random.normal(jax.random.key(1), (1, 2, 16))
    for params in (ours, dequantized(ours)):
        _close(module.apply({"params": params}, x, method="attend"), x @ dequantized(ours)["embedding"].T)
        _close(module.apply({"params": params}, ids), dequantized(ours)["embedding"][ids])
