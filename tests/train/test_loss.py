"""The loss that never holds logits: equal to the plain one, gradient included, on a mesh too, and small in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smolvlm_jax import make_mesh
from smolvlm_jax.model import causal_lm_loss
from smolvlm_jax.sharding import activate
from smolvlm_jax.train.loss import IGNORE, chunked_loss, next_token_targets

B, T, D, V = 8, 37, 16, 100


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    labels = np.where(rng.random((B, T)) < 0.6, IGNORE, rng.integers(0, V, (B, T)))
    labels[3] = IGNORE  # a row that teaches nothing
    return hidden, kernel, jnp.asarray(labels)


@pytest.mark.parametrize(
    ("tied", "axes", "chunk"),
    [
        (False, None, 1),
        (True, None, 40),
        (False, None, 10_000),
        (False, (2, 2, 2), 40),
        (True, (2, 2, 2), 10),
        (False, (1, 8, 1), 10_000),
    ],
)
def test_equals_the_plain_loss(case, tied, axes, chunk):
    hidden, kernel, labels = case
    targets = next_token_targets(labels)
    count = int((targets != IGNORE).sum())

    def ours(hidden, kernel):
        total, n, hits = chunked_loss(hidden, kernel.T if tied else kernel, targets, chunk=chunk, tied=tied)
        return 0.3 * total / n, (n, hits)

    plain = lambda hidden, kernel: 0.3 * causal_lm_loss(hidden @ kernel, labels)
    run = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))
    if axes:
        with activate(make_mesh(*axes)):
            (loss, (n, hits)), gradients = run(hidden, kernel)
    else:
        (loss, (n, hits)), gradients = run(hidden, kernel)
    wanted, want = jax.value_and_grad(plain, (0, 1))(hidden, kernel)
    assert int(n) == count and float(loss) == pytest.approx(float(wanted), rel=1e-6)
    ranked = (hidden @ kernel).argmax(-1)
    assert int(hits) == int(((ranked == targets) & (targets != IGNORE)).sum())
    for a, b in zip(gradients, want, strict=True):
        assert float(jnp.linalg.norm(a - b)) <= 1e-6 * float(jnp.linalg.norm(b))


def test_no_label_at_all(case):
    hidden, kernel, labels = case
    total, n, hits = chunked_loss(hidden, kernel, jnp.full_like(labels, IGNORE))
    assert (float(total), int(n), int(hits)) == (0, 0, 0)


def test_the_last_token_of_a_segment_does_not_predict_the_next_segment():
    labels = jnp.arange(10, 18)[None]
    segments = jnp.array([[1, 1, 1, 2, 2, 3, 0, 0]])
    assert next_token_targets(labels)[0].tolist() == [11, 12, 13, 14, 15, 16, 17, IGNORE]
    assert next_token_targets(labels, segments)[0].tolist() == [11, 12, IGNORE, 14, IGNORE, IGNORE, 17, IGNORE]


@pytest.mark.parametrize("width", [576, 960])
@pytest.mark.parametrize("tied", [False, True])
def test_memory(width, tied):
    """Temporaries of loss and gradient over 8,192 tokens: a vocabulary of 49,280 costs at most 200 MB more than one of 512.
    Its logits alone would be 1.6 GB."""

    def temporaries(vocabulary: int) -> int:
        shape = (vocabulary, width) if tied else (width, vocabulary)
        inputs = [
            jax.ShapeDtypeStruct((4, 2048, width), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct((4, 2048), jnp.int32),
        ]
        loss = lambda hidden, kernel, targets: chunked_loss(hidden, kernel, targets, tied=tied)[0]
        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    more = temporaries(49_280) - temporaries(512)
    print(f"{more / 1e6:.0f} MB more")
    assert more <= 200e6
