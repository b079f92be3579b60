"""cuDNN's attention: when it is taken, and that what it is given means the same as the einsums.

No GPU is here: XLA computes what cuDNN would be asked for. What the CUDA compiler makes of it stands in docs/plan.md.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import fast_first

from smolvlm_jax import make_mesh
from smolvlm_jax.attention import cudnn, trial
from smolvlm_jax.attention.dispatch import attention
from smolvlm_jax.attention.forms import SegmentMask, by_einsum
from smolvlm_jax.sharding import activate


@pytest.fixture
def by_xla(monkeypatch):
    """jax's own formula where cuDNN would be called; a list of the calls."""
    calls, plain = [], jax.nn.dot_product_attention

    def called(*arrays, implementation, **options):
        calls.append(implementation)
        return plain(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", called)
    return calls


def inputs(rows: int, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (rows, n, 160, 16), dtype) for key, n in zip(keys, (6, 2, 2), strict=True))
    ids = (jnp.arange(160)[None] // jnp.asarray([[70]] * rows) + 1) * (jnp.arange(160) < 150)
    causal = jnp.tril(jnp.ones((160, 160), bool))
    packed = SegmentMask((ids[:, :, None] == ids[:, None]) & (ids > 0)[:, :, None] & causal, ids, causal=True)
    return q, k, v, {"none": None, "causal": SegmentMask(causal[None], None, causal=True), "packed": packed}


@pytest.mark.parametrize("kind", fast_first(1, ["packed", "causal", "none"]))
@pytest.mark.parametrize("mesh", fast_first(1, [None, (4, 1, 2)]))
def test_it_is_asked_for_what_the_einsums_compute(kind, mesh, by_xla):
    q, k, v, masks = inputs(4)
    with activate(mesh and make_mesh(*mesh)):
        ours = jax.jit(cudnn.cudnn_attention)(q, k, v, masks[kind])
    wanted = by_einsum(*(x.astype(jnp.float32) for x in (q, k, v)), masks[kind])
    real = np.arange(160) < (150 if kind == "packed" else 160)  # padding sees nothing, and is not read
    difference = np.asarray(ours, np.float32)[:, :, real] - np.asarray(wanted)[:, :, real]
    assert np.abs(difference).max() <= 0.03 and set(by_xla) == {"cudnn"}


@pytest.mark.parametrize("mesh", [None, pytest.param((4, 1, 2), marks=pytest.mark.thorough)])
def test_a_step_is_asked_for_what_the_einsums_compute(mesh, by_xla):
    """One query a row and a cache: each key head is a row of its own; nothing but a view of the cache is passed on."""
    q, k, v, _ = inputs(4)
    q, seen = q[:, :, :1], (jnp.arange(160) - 30) % 160 < jnp.asarray([160, 70, 1, 20])[:, None, None]
    with activate(mesh and make_mesh(*mesh)):
        ours = jax.jit(cudnn.cudnn_step)(q, k, v, seen)
    wanted = by_einsum(*(x.astype(jnp.float32) for x in (q, k, v)), seen)
    assert ours.shape == q.shape and np.abs(np.asarray(ours, np.float32) - np.asarray(wanted)).max() <= 0.03
    assert set(by_xla) == {"cudnn"}


def test_when_a_step_takes_it(monkeypatch):
    q, k, _, masks = inputs(1)
    q, seen = q[:, :, :1], jnp.ones((1, 1, 160), bool)
    assert not cudnn.fits_cudnn_step(q, k, seen), "not without jax's CUDA plugin"
    monkeypatch.setattr(cudnn, "_installed", lambda: True)
    assert cudnn.fits_cudnn_step(q, k, seen)
    assert not cudnn.fits_cudnn_step(q.astype(jnp.float32), k, seen) and not cudnn.fits_cudnn_step(q, k, None)
    assert not cudnn.fits_cudnn_step(k[:, :, :2], k, seen) and not cudnn.fits_cudnn_step(q, k[:, :, :90], seen)
    assert not any(cudnn.fits_cudnn(q, k, mask) for mask in (*masks.values(), seen)), "the other form's rows are whole"


def test_when_it_is_taken(monkeypatch):
    q, k, _, masks = inputs(1)
    assert not any(cudnn.fits_cudnn(q, k, mask) for mask in masks.values()), "not without jax's CUDA plugin"
    monkeypatch.setattr(cudnn, "_installed", lambda: True)
    fits = functools.partial(cudnn.fits_cudnn, mask=None)
    assert all(cudnn.fits_cudnn(q, k, mask) for mask in masks.values())
    assert not cudnn.fits_cudnn(q, k, masks["causal"].array), "a mask that is only an array"
    assert not fits(q.astype(jnp.float32), k.astype(jnp.float32)) and not fits(q[:, :, :64], k[:, :, :64])
    assert not fits(q[:, :, :1], k) and not fits(q[..., :12], k[..., :12])
    odd = masks["packed"]
    assert fits(q[:, :, :159], k[:, :, :159]) and not cudnn.fits_cudnn(q[:, :, :159], k[:, :, :159], odd)


def test_programs_for_other_platforms_have_none_of_it(monkeypatch, by_xla):
    """Where the plugin is installed, a program for a TPU or a CPU is still its own."""
    monkeypatch.setattr(cudnn, "_installed", lambda: True)
    q, k, v, _ = inputs(1)
    programs = {
        platform: jax.export.export(jax.jit(lambda *x: attention(*x).output), platforms=[platform])(q, k, v).mlir_module()
        for platform in ("cpu", "tpu", "cuda")
    }
    assert programs["cuda"] != programs["cpu"]
    assert by_xla and jax.jit(lambda *x: attention(*x).output)(q, k, v).dtype == jnp.bfloat16


@pytest.mark.thorough
def test_the_trial_compares_output_and_gradient(by_xla, monkeypatch):
    assert trial._fault(trial.cudnn_example) is None and trial._fault(trial.cudnn_step_example) is None and by_xla
    for name, example in (("cudnn_attention", trial.cudnn_example), ("cudnn_step", trial.cudnn_step_example)):
        monkeypatch.setattr(trial, name, lambda q, k, v, mask: jnp.zeros_like(q))
        assert "is wrong" in str(trial._fault(example))
