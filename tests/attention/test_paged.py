"""cuDNN's attention over pages: that what it is given means the same as the einsums. No GPU is here: the call is replaced."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smolvlm_jax import make_mesh
from smolvlm_jax.attention import LayerCache, cached_attention, cudnn, paged, trial
from smolvlm_jax.attention.forms import by_einsum
from smolvlm_jax.cache import PairBuffers
from smolvlm_jax.sharding import activate


@pytest.fixture
def calls(monkeypatch):
    """What XLA hands to cuDNN, computed by looking up the pages; a list of the operations' names."""
    found = []

    def ffi_call(name, results, *, legacy_backend_config, output_layouts, **options):
        settings = json.loads(legacy_backend_config)["cudnn_fmha_backend_config"]
        assert settings["is_paged_attention"] and settings["is_flash_attention"] and options["custom_call_api_version"] == 2

        def run(q, k, v, bias, query_lengths, lengths, keys, values):
            found.append(name)
            rows, size = len(q), q.shape[-1]
            looked_up = lambda pages, table: jnp.asarray(pages)[table[:, 0, :, 0]].reshape(rows, -1, size).astype(jnp.float32)
            assert (query_lengths == 1).all() and bias.shape == (rows, 1, 1, lengths[0])
            scores = jnp.einsum("rgh,rsh->rgs", q[:, 0].astype(jnp.float32), looked_up(k, keys)) * settings["fmha_scale"]
            weights = jax.nn.softmax(scores + bias[:, 0].astype(jnp.float32), -1)
            out = jnp.einsum("rgs,rsh->rgh", weights, looked_up(v, values))[:, :, None]
            assert out.shape == results[0].shape and output_layouts == ((0, 2, 1, 3), None)
            return out.astype(q.dtype), None

        return run

    monkeypatch.setattr(jax.ffi, "ffi_call", ffi_call)
    return found


def inputs(rows=4, queries=6, heads=2, length=256):
    shapes = (rows, queries, 1, 64), (rows, heads, length, 64), (rows, heads, length, 64)
    q, k, v = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True)
    )
    seen = (40 - jnp.arange(length)) % length < jnp.asarray([length, 100, 1, 30])[:, None, None]
    return q, k, v, seen


@pytest.mark.thorough
@pytest.mark.parametrize("mesh", [None, (2, 1, 2)])
def test_it_is_asked_for_what_the_einsums_compute(mesh, calls):
    q, k, v, seen = inputs()
    pairs = PairBuffers.of(k, v, jnp.bfloat16).heads
    with activate(mesh and make_mesh(*mesh, devices=jax.devices()[:4])):
        ours = jax.jit(paged.paged_step)(q, pairs, seen)
    wanted = by_einsum(*(x.astype(jnp.float32) for x in (q, k, v)), seen)
    assert ours.shape == q.shape and np.abs(np.asarray(ours, np.float32) - np.asarray(wanted)).max() <= 0.03
    assert set(calls) == {"__cudnn$fmhaScaleBiasSoftmax"}


def test_when_a_step_takes_it(monkeypatch):
    q, k, v, _ = inputs()
    pairs = PairBuffers.of(k, v, jnp.bfloat16)
    assert not paged.fits_paged(q, pairs.heads), "not without jax's CUDA plugin"
    monkeypatch.setattr(cudnn, "_installed", lambda: True)
    assert paged.fits_paged(q, pairs.heads) and not paged.fits_paged(k, pairs.heads)
    assert not paged.fits_paged(q, pairs.heads[:, :, :200]) and not paged.fits_paged(q, pairs.heads.astype(jnp.float32))


def test_programs_for_other_platforms_have_none_of_it(monkeypatch, calls):
    q, k, v, seen = inputs()
    given = q, k[:, :, :1], v[:, :, :1], PairBuffers.of(k, v, jnp.bfloat16), seen, jnp.asarray(40)

    def program(platform):
        step = lambda q, k, v, buffers, seen, start: cached_attention(q, k, v, LayerCache(buffers, start), seen).output
        return jax.export.export(jax.jit(step), platforms=[platform])(*given).mlir_module()

    assert "gather" not in program("cuda") and not calls
    monkeypatch.setattr(cudnn, "_installed", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *_, **__: q)
    assert "gather" in program("cuda") and calls
    assert "gather" not in program("cpu")


@pytest.mark.thorough
def test_the_trial_sees_what_is_wrong(calls, monkeypatch):
    assert trial._fault(trial.paged_example) is None and calls
    monkeypatch.setattr(trial, "paged_step", lambda q, pairs, mask: jnp.zeros_like(q))
    assert "is wrong" in str(trial._fault(trial.paged_example))
