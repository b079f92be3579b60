"""The kernel for TPUs: the same function as the einsums, on a mesh too, taken where it is meant to be and nowhere else.

Here it runs in the interpreter; the TPU compiler sees it in tests/engine/test_tpu_programs.py and with the recipes.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import fast_first

from smolvlm_jax import decoder, make_mesh
from smolvlm_jax.attention import SegmentMask, attention, splash
from smolvlm_jax.errors import ConfigError
from smolvlm_jax.sharding import activate

# rows, query heads, key/value heads, length, head size, causal
SHAPES = {
    "packed prompts": (2, 6, 2, 512, 64, True),
    "a length that is no multiple of 128": (1, 3, 1, 600, 64, True),
    "patches of the 2.2B": (1, 2, 2, 729, 72, False),
}


def make(name: str):
    """Inputs in bfloat16, segments with padding at the end, weights of the outputs that somebody reads."""
    b, n, kv, t, h, causal = SHAPES[name]
    rng = np.random.default_rng(t)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((b, n, t, h), (b, kv, t, h), (b, kv, t, h)))
    ids = np.sort(rng.integers(1, 4, (b, t)), axis=1).astype(np.int32) if causal else np.ones((b, t), np.int32)
    if causal:
        ids[:, -50:] = 0
    array = (ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, None, :]
    mask = SegmentMask(jnp.asarray(array & np.tril(np.ones((t, t), bool)) if causal else array), jnp.asarray(ids), causal)
    return (q, k, v), mask, jnp.asarray(np.where(ids[:, None, :, None], rng.standard_normal(q.shape), 0), jnp.float32)


def gradients(form, inputs, weigh):
    loss = lambda *inputs: jnp.sum(form(*inputs).astype(jnp.float32) * weigh)
    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*inputs))


def distance(ours, wanted) -> list[float]:
    return [float(jnp.linalg.norm(jnp.ravel(x - y)) / jnp.linalg.norm(jnp.ravel(y))) for x, y in zip(ours, wanted, strict=True)]


@pytest.mark.parametrize("name", fast_first(1, SHAPES))
def test_as_near_to_float32_as_the_einsums(name):
    """Values and gradients in bfloat16, measured against the einsums in float32."""
    inputs, mask, weigh = make(name)
    plain = lambda *inputs: attention(*inputs, mask, return_weights=True)[0]
    kernel = partial(splash.splash_attention, segment_ids=mask.segment_ids, causal=mask.causal, interpret=True)
    wanted = gradients(plain, [x.astype(jnp.float32) for x in inputs], weigh)
    for ours, theirs in zip(
        distance(gradients(kernel, inputs, weigh), wanted)[1:],
        distance(gradients(plain, inputs, weigh), wanted)[1:],
        strict=True,
    ):
        assert ours <= 0.006 and ours <= 2 * theirs
    assert kernel(*inputs).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", fast_first(1, [(2, 2, 2), (8, 1, 1), (1, 2, 4)]))
def test_on_a_mesh(shape):
    """Rows and heads that divide and ones that do not: what one device computes."""
    if len(jax.devices()) < 8:
        pytest.skip("eight devices are needed")
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, n, 256, 64)), jnp.bfloat16) for n in (6, 2, 2))
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (4, 256)), axis=1), jnp.int32)
    run = jax.jit(partial(splash.splash_attention, causal=True, interpret=True))
    alone = run(q, k, v, ids)
    with activate(make_mesh(*shape)):
        together = run(q, k, v, ids)
    assert np.abs(np.asarray(alone - together, np.float32)).max() <= 0.01


def lowered(platform, dtype, t, mask, backwards=False, form="auto") -> str:
    q, k, v = (jax.ShapeDtypeStruct((2, n, t, 64), dtype) for n in (6, 2, 2))
    fn = lambda q, k, v, mask: attention(q, k, v, mask, form=form)[0]
    if backwards:
        fn = jax.grad(lambda *inputs: attention(*inputs, form=form)[0].astype(jnp.float32).sum(), (0, 1, 2))
    return jax.export.export(jax.jit(fn), platforms=[platform])(q, k, v, mask).mlir_module()


def test_taken_on_tpu_in_bfloat16_and_nowhere_else():
    array = lambda t: jax.ShapeDtypeStruct((2, t, t), bool)
    segments = lambda t: SegmentMask(array(t), jax.ShapeDtypeStruct((2, t), jnp.int32), True)
    used = lambda *arguments, **options: "tpu_custom_call" in lowered(*arguments, **options)
    assert used("tpu", jnp.bfloat16, 512, segments(512))
    assert used("tpu", jnp.bfloat16, 512, segments(512), backwards=True)
    assert used("tpu", jnp.bfloat16, 729, None), "pictures"
    assert used("tpu", jnp.bfloat16, 512, SegmentMask(array(512), None, True)), "a prompt without padding"
    assert not used("tpu", jnp.bfloat16, 512, array(512)), "a mask that may be anything"
    assert not used("tpu", jnp.bfloat16, 256, segments(256)), "short"
    assert not used("tpu", jnp.float32, 512, segments(512)), "exact"
    assert not used("cuda", jnp.bfloat16, 512, segments(512))
    assert not used("cpu", jnp.bfloat16, 512, segments(512))


def test_the_form_can_be_chosen():
    """By name, wherever it fits; a name that no form has is refused."""
    mask = SegmentMask(jax.ShapeDtypeStruct((2, 512, 512), bool), None, True)
    text = lambda form: lowered("tpu", jnp.bfloat16, 512, mask, form=form)
    assert "tpu_custom_call" in text("splash")
    assert "tpu_custom_call" not in text("einsum") and "stablehlo.while" not in text("einsum")
    assert "tpu_custom_call" not in text("blockwise") and "stablehlo.while" in text("blockwise")
    assert "tpu_custom_call" not in text("decode"), "which is for decode steps"
    with pytest.raises(ConfigError, match="attention 'fused' is none of auto, decode, cudnn, einsum, splash"):
        text("fused")


@pytest.mark.parametrize("segments", fast_first(1, [True, False]))
@pytest.mark.parametrize("padding", fast_first(1, [True, False]))
def test_the_decoder_says_the_same_twice(tiny_a, monkeypatch, segments, padding):
    """The array it gives attention is what the segments say, for every query that is no padding."""
    masks = []

    def listen(q, k, v, mask, **options):
        masks.append(mask)
        return attention(q, k, v, mask, **options)

    monkeypatch.setattr(decoder, "attention", listen)
    rng = np.random.default_rng(0)
    t = 12
    options = {}
    if segments:
        options["segment_ids"] = np.sort(rng.integers(0, 3, (2, t)), axis=1)
    if padding:
        options["attention_mask"] = (rng.random((2, t)) > 0.3).astype(np.int32)
    tiny_a.model.apply({"params": tiny_a.params}, input_ids=rng.integers(1, 90, (2, t)), **options)
    mask = masks[0]
    array = np.broadcast_to(mask.array, (2, t, t))
    ids = np.ones((2, t), int) if mask.segment_ids is None else np.asarray(mask.segment_ids)
    assert (mask.segment_ids is None) == (not options)
    said = (ids[:, :, None] == ids[:, None, :]) & np.tril(np.ones((t, t), bool))
    real = ids > 0
    assert mask.causal and (array[real] == said[real]).all() and array[real].any()
