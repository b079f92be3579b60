"""Every form of attention is the same function, the platform of the program chooses among them, and decoding copies nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smolvlm_jax import make_mesh
from smolvlm_jax.attention import forms as module
from smolvlm_jax.attention.blockwise import blockwise_attention
from smolvlm_jax.attention.dispatch import attention
from smolvlm_jax.layers import Projection
from smolvlm_jax.sharding import Dimension, activate, constrain

TOLERANCE = 2e-6
# rows, query heads, key/value heads, queries, keys, mask
SHAPES = {
    "one query": (2, 6, 2, 1, 24, (2, 1, 24)),
    "one query, one mask for all rows": (2, 6, 2, 1, 24, (1, 1, 24)),
    "one query, no mask": (1, 3, 3, 1, 24, None),
    "a chunk beside a cache": (2, 9, 3, 6, 24, (2, 6, 24)),
    "causal": (2, 6, 2, 12, 12, (1, 12, 12)),
    "patches": (3, 4, 4, 12, 12, (3, 1, 12)),
    "all patches": (2, 4, 4, 12, 12, None),
}


def make(name: str):
    rng = np.random.default_rng(len(name))
    b, n, kv, t, s, mask_shape = SHAPES[name]
    q, k, v = (rng.standard_normal(shape, np.float32) for shape in ((b, n, t, 8), (b, kv, s, 8), (b, kv, s, 8)))
    mask = None
    if mask_shape:
        mask = np.tril(np.ones((t, t), bool))[None] if name == "causal" else rng.random(mask_shape) > 0.4
        mask[..., 0] = True
    return q, k, v, mask


def plainly(q, k, v, mask):
    """In float64, a query head and a row at a time."""
    b, n, t, h = q.shape
    out = np.empty(q.shape)
    for i in range(b):
        for j in range(n):
            kv = j // (n // k.shape[1])
            scores = q[i, j].astype(np.float64) @ k[i, kv].T / np.sqrt(h)
            if mask is not None:
                scores = np.where(np.broadcast_to(mask, (b, t, k.shape[2]))[i], scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[i, j] = weights / weights.sum(-1, keepdims=True) @ v[i, kv]
    return out


@pytest.fixture
def all_large(monkeypatch):
    """Shapes of a test's size count as large."""
    monkeypatch.setattr(module, "LARGE", 1)


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients(name, all_large):
    q, k, v, mask = make(name)
    expected = plainly(q, k, v, mask)
    by_einsum, weights, _ = attention(q, k, v, mask, return_weights=True)
    chosen, none, _ = jax.jit(lambda *inputs: attention(*inputs, mask))(q, k, v)
    assert none is None and weights.shape == (*q.shape[:3], k.shape[2])
    assert np.abs(by_einsum - expected).max() <= TOLERANCE
    assert np.abs(chosen - expected).max() <= TOLERANCE

    def gradients(**options):
        loss = lambda *inputs: jnp.sin(attention(*inputs, mask, **options)[0]).sum()
        return jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(q, k, v)

    for ours, theirs in zip(gradients(), gradients(return_weights=True), strict=True):
        assert np.abs(ours - theirs).max() <= TOLERANCE


@pytest.mark.parametrize("name", ["one query", "causal"])
def test_the_platform_of_the_program_chooses(name, all_large):
    q, k, v, mask = make(name)
    fn = lambda *inputs: attention(*inputs, mask)[0]
    by_einsum = lambda text: "stablehlo.while" not in text and text.count("stablehlo.dot_general") == 2
    for platform, wanted in (("cpu", False), ("tpu", True), ("cuda", True)):
        assert by_einsum(jax.export.export(jax.jit(fn), platforms=[platform])(q, k, v).mlir_module()) == wanted
    # On a CPU too it is the einsums in anything but float32, and on a mesh.
    assert by_einsum(jax.jit(fn).lower(*(x.astype(jnp.bfloat16) for x in (q, k, v))).as_text())
    if len(jax.devices()) > 1:
        with activate(make_mesh()):
            assert by_einsum(jax.jit(fn).lower(q, k, v).as_text())


@pytest.mark.parametrize("block", [1, 5, 12])
@pytest.mark.parametrize("name", [name for name in SHAPES if "query" not in name])
def test_blocks_are_the_whole(name, block):
    """Values and gradients, with blocks that divide the queries and blocks that do not, and a query that may look nowhere."""
    q, k, v, mask = make(name)
    if mask is not None:
        mask[:, 0] = False
    weigh = np.random.default_rng(1).standard_normal(q.shape, np.float32)
    whole = lambda *inputs: jnp.sum(weigh * attention(*inputs, mask, return_weights=True)[0])
    parts = lambda *inputs: jnp.sum(weigh * blockwise_attention(*inputs, mask, block))
    ours, theirs = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q, k, v) for f in (parts, whole))
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(x - y).max() <= 3 * TOLERANCE * max(1, np.abs(y).max())


def test_blocks_on_a_mesh(monkeypatch):
    """Rows and heads of other devices: the same gradients, in bfloat16 as on accelerators."""
    if len(jax.devices()) < 8:
        pytest.skip("eight devices are needed")
    monkeypatch.setattr(module, "BLOCK", 64)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((4, n, 32, 8)), jnp.bfloat16) for n in (4, 2, 2))
    mask = np.tril(np.ones((32, 32), bool))[None]

    def gradients(q, k, v):
        q, k, v = (constrain(x, "batch", "act_heads", None, None) for x in (q, k, v))
        return jax.grad(lambda *x: jnp.sin(attention(*x, mask)[0].astype(jnp.float32)).sum(), (0, 1, 2))(q, k, v)

    alone = jax.jit(gradients)(q, k, v)
    with activate(make_mesh(2, 2, 2)):
        together = jax.jit(gradients)(q, k, v)
    for x, y in zip(alone, together, strict=True):
        assert np.abs(np.asarray(x - y, np.float32)).max() <= 0.02 * np.abs(np.asarray(x, np.float32)).max()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_scores_of_a_long_row_are_never_whole(platform):
    """Forwards and backwards, on accelerators: no array of 2,048 × 2,048 but the mask."""
    t = 2048
    q, k, v = (jax.ShapeDtypeStruct((1, n, t, 64), jnp.bfloat16) for n in (15, 5, 5))
    mask = jax.ShapeDtypeStruct((1, t, t), bool)

    def gradients(q, k, v, mask):
        loss = jax.checkpoint(lambda *x: attention(*x, mask)[0].astype(jnp.float32).sum())
        return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    text = jax.export.export(jax.jit(gradients), platforms=[platform])(q, k, v, mask).mlir_module()
    assert f"{t}x{t}xi1" in text and f"{t}x{t}xf32" not in text and f"{t}x{t}xbf16" not in text
    assert "stablehlo.while" in text


def test_small_scores_stay_in_one_product():
    q, k, v, mask = make("causal")
    assert "stablehlo.while" not in jax.jit(lambda *inputs: attention(*inputs, mask)[0]).lower(q, k, v).as_text()


@pytest.mark.parametrize("rows", [1, 4])
def test_a_decode_step_copies_neither_cache_nor_kernels(rows):
    """Buffers are updated in place, and neither they nor the kernels are transposed for the products."""
    length, kv, h, d = 512, 3, 64, 192
    buffer = jax.ShapeDtypeStruct((rows, kv, length, h), jnp.float32)
    sizes = {"d": Dimension(d, "embed"), "n": Dimension(9, "heads"), "h": Dimension(h)}
    projections = [Projection(equation, sizes) for equation in ("btd,dnh->bnth", "bnth,nhd->btd")]

    def step(keys, values, first, last, x, new, mask, start):
        keys, values = (jax.lax.dynamic_update_slice(y, new, (0, 0, start, 0)) for y in (keys, values))
        q = projections[0].apply({"params": {"kernel": first}}, x)
        return keys, values, projections[1].apply({"params": {"kernel": last}}, attention(q, keys, values, mask)[0])

    shapes = [(d, 9, h), (9, h, d), (rows, 1, d), (rows, kv, 1, h)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    inputs += [jax.ShapeDtypeStruct((rows, 1, length), bool), jax.ShapeDtypeStruct((), jnp.int32)]
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(buffer, buffer, *inputs).compile().memory_analysis()
    size = 4 * rows * kv * length * h
    assert memory.alias_size_in_bytes >= 2 * size
    assert memory.temp_size_in_bytes < min(size, 4 * d * 9 * h)
