"""The forward as a pure function: masks, causality, merging, counts, arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smolvlm_jax.errors import InputError
from smolvlm_jax.layers import rotary_tables
from smolvlm_jax.merge import merge_image_features
from smolvlm_jax.model import causal_lm_loss
from smolvlm_jax.vision import normalize_tiles


def test_later_tokens_change_nothing_before_them(tiny_a):
    apply = jax.jit(tiny_a.model.apply)
    base = apply(tiny_a.variables, input_ids=tiny_a.ids, pixel_values=tiny_a.pixels).logits
    for column in (1, tiny_a.tokens + 2, tiny_a.ids.shape[1] - 1):
        ids = tiny_a.ids.copy()
        ids[0, column] = 77
        changed = apply(tiny_a.variables, input_ids=ids, pixel_values=tiny_a.pixels).logits
        assert np.array_equal(base[:, :column], changed[:, :column])
        assert np.abs(base[:, column:] - changed[:, column:]).max() > 1e-3


def test_causality_holds_under_a_padding_mask(tiny_a):
    base = dict(attention_mask=tiny_a.batch_mask, pixel_values=tiny_a.batch_pixels, position_ids=tiny_a.batch_positions)
    ids = tiny_a.batch_ids.copy()
    a = tiny_a.apply(input_ids=ids, **base).logits
    ids[:, -1] = 77
    b = tiny_a.apply(input_ids=ids, **base).logits
    real = (tiny_a.batch_mask == 1)[:, :-1]
    assert np.array_equal(np.asarray(a)[:, :-1][real], np.asarray(b)[:, :-1][real])


def test_what_stands_on_padding_is_never_read(tiny_a):
    base = dict(attention_mask=tiny_a.batch_mask, pixel_values=tiny_a.batch_pixels, position_ids=tiny_a.batch_positions)
    noise = np.where(tiny_a.batch_mask == 0, 99, tiny_a.batch_ids)
    a, b = (tiny_a.apply(input_ids=ids, **base).logits for ids in (tiny_a.batch_ids, noise))
    real = tiny_a.batch_mask == 1
    assert np.array_equal(np.asarray(a)[real], np.asarray(b)[real])
    assert np.isfinite(a).all(), "rows that see nothing stay finite"


def test_swapping_pictures_swaps_features_and_changes_answers(tiny_a):
    a = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels)
    b = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels[:, ::-1])
    assert np.array_equal(a.image_hidden_states, b.image_hidden_states[::-1])
    assert np.abs(a.logits[0, -1] - b.logits[0, -1]).max() > 1e-2


def test_the_pictures_batch_need_not_be_the_texts(tiny_a):
    """Only the total counts, and a zero picture in the middle changes nothing."""
    a = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels).logits
    b = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels.reshape(2, 1, 3, 32, 32)).logits
    zero = np.zeros((1, 1, 3, 32, 32), np.float32)
    padded = np.concatenate([tiny_a.pixels[:, :1], zero, tiny_a.pixels[:, 1:], zero], axis=1)
    c = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=padded).logits
    assert np.array_equal(a, b) and np.abs(a - c).max() <= 2e-5


def test_all_zero_pictures_keep_the_first(tiny_a):
    ids = np.array([[1, *[150] * tiny_a.tokens, 7]])
    out = tiny_a.apply(input_ids=ids, pixel_values=np.zeros((1, 2, 3, 32, 32), np.float32))
    plain = tiny_a.apply(input_ids=ids)
    assert np.abs(out.logits - plain.logits).max() > 1e-3


def test_inputs_embeds(tiny_a):
    """Embeddings instead of ids: slots are where the embedding of the image token stands."""
    embeds = tiny_a.model.bind(tiny_a.variables).model.embed(tiny_a.ids)
    a = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels).logits
    b = tiny_a.apply(inputs_embeds=embeds, pixel_values=tiny_a.pixels).logits
    assert np.array_equal(a, b)
    for wrong in ({}, {"input_ids": tiny_a.ids, "inputs_embeds": embeds}):
        with pytest.raises(InputError, match="exactly one"):
            tiny_a.apply(**wrong)
    features = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels).image_hidden_states
    with pytest.raises(InputError, match="at most one"):
        tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels, image_hidden_states=features)


def test_counts_are_checked_on_the_host_and_defined_under_tracing(tiny_a):
    surplus = np.concatenate([tiny_a.pixels, tiny_a.pixels[:, :1]], axis=1)
    for pixels in (tiny_a.pixels[:, :1], surplus):
        with pytest.raises(InputError, match="image tokens"):
            tiny_a.apply(input_ids=tiny_a.ids, pixel_values=pixels)
    with pytest.raises(InputError, match="0 image tokens"):
        tiny_a.apply(input_ids=np.array([[1, 5]]), pixel_values=tiny_a.pixels)
    apply = jax.jit(tiny_a.model.apply)
    want = apply(tiny_a.variables, input_ids=tiny_a.ids, pixel_values=tiny_a.pixels).logits
    more = apply(tiny_a.variables, input_ids=tiny_a.ids, pixel_values=surplus).logits
    assert np.abs(want - more).max() <= 2e-5, "a surplus tile is ignored"
    # a missing tile leaves the embedding of the image token, as a prompt without pictures has it
    embeds = tiny_a.model.bind(tiny_a.variables).model.embed(tiny_a.ids)
    fewer = apply(tiny_a.variables, input_ids=tiny_a.ids, pixel_values=tiny_a.pixels[:, :1])
    features = fewer.image_hidden_states
    merged = np.array(embeds)
    merged[0, 2 : 2 + tiny_a.tokens] = features[0]
    by_hand = apply(tiny_a.variables, inputs_embeds=merged).logits
    assert np.abs(fewer.logits - by_hand).max() <= 2e-5


def test_uint8_bucket_padding_stands_last(tiny_a):
    tiles = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    padded = np.concatenate([tiles, np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)])
    a = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiles).logits
    b = jax.jit(tiny_a.model.apply)(tiny_a.variables, input_ids=tiny_a.ids, pixel_values=padded, num_tiles=2).logits
    assert np.abs(a - b).max() <= 2e-5
    for shape in ((2, 3, 32, 32), (1, 2, 32, 32, 3)):
        with pytest.raises(InputError, match="uint8 tiles"):
            jax.jit(tiny_a.model.apply)(tiny_a.variables, input_ids=tiny_a.ids, pixel_values=np.zeros(shape, np.uint8))


def test_normalised_pixels_are_the_references(golden_arrays):
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    want = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)
    got = np.asarray(normalize_tiles(jnp.asarray(values), jnp.float32)).ravel()
    assert np.array_equal(got.view(np.uint32), want.view(np.uint32))
    bits = {0: 0xBF800000, 1: 0xBF7DFDFE, 127: 0xBB808080, 128: 0x3B808100, 200: 0x3F119192, 255: 0x3F800000}
    assert {v: int(got.view(np.uint32)[v]) for v in bits} == bits
    for function in (normalize_tiles, jax.jit(normalize_tiles, static_argnums=1)):
        half = np.asarray(function(jnp.asarray(values), jnp.bfloat16).astype(jnp.float32)).ravel()
        assert np.array_equal(half, np.asarray(jnp.asarray(want).astype(jnp.bfloat16).astype(jnp.float32)))


def test_logits_to_keep(tiny_a):
    run = lambda **kw: tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels, **kw).logits
    whole = run()
    assert np.allclose(run(logits_to_keep=3), whole[:, -3:], atol=1e-6)
    assert np.allclose(run(logits_to_keep=jnp.array([0, 4])), whole[:, jnp.array([0, 4])], atol=1e-6)


def test_attentions_are_distributions_over_what_may_be_seen(tiny_a):
    out = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 3 and out.attentions[0].shape == (1, 6, 37, 37)
    for weights in out.attentions:
        assert np.allclose(weights.sum(-1), 1, atol=1e-5) and np.allclose(np.triu(weights[0, 0], 1), 0)
    assert len(out.hidden_states) == 4


def test_loss():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, 6, 11)).astype(np.float32), rng.integers(0, 11, (2, 6))
    labels[0, :3] = -100
    chosen = [(b, t) for b in range(2) for t in range(5) if labels[b, t + 1] != -100]
    by_hand = np.mean([np.log(np.exp(logits[b, t]).sum()) - logits[b, t, labels[b, t + 1]] for b, t in chosen])
    assert float(causal_lm_loss(jnp.asarray(logits), jnp.asarray(labels))) == pytest.approx(by_hand, rel=1e-6)
    assert np.isnan(causal_lm_loss(jnp.asarray(logits), jnp.full((2, 6), -100)))


@pytest.mark.parametrize("position", [0, 1000, 8191, 16383])
@pytest.mark.parametrize("theta", [1e5, 130000.0, 273768.0])
def test_rotary_tables_keep_their_precision(position, theta):
    """Angles are float32 whatever the model computes in; only the finished cosine is rounded."""
    exact = position * (1.0 / theta ** (np.arange(0, 64, 2) / 64.0))
    for dtype, tolerance in ((jnp.float32, 2e-3), (jnp.bfloat16, 6e-3)):
        cos, sin = rotary_tables(jnp.array([[position]]), 64, theta, dtype)
        assert np.abs(np.asarray(cos, np.float64).ravel() - np.cos(exact)).max() < tolerance
        assert np.abs(np.asarray(sin, np.float64).ravel() - np.sin(exact)).max() < tolerance


def test_float16_never_reaches_the_encoder(tiny_a):
    """Weights that overflow float16 within the encoder: features are those of float32."""
    loud = jax.tree.map(lambda x: x, tiny_a.params)
    loud["model"]["vision_model"]["embeddings"]["patch_embedding"]["bias"] += 1e5
    half = tiny_a.model.clone(dtype=jnp.float16)
    got, _ = half.apply({"params": loud}, tiny_a.pixels, method="get_image_features")
    want, _ = tiny_a.model.apply({"params": loud}, tiny_a.pixels, method="get_image_features")
    assert got.dtype == jnp.float16 and np.isfinite(got).all()
    assert np.abs(got.astype(jnp.float32) - want).max() <= 2e-2 * np.abs(want).max()


def test_merge_counts_slots_over_the_whole_batch():
    embeds = jnp.zeros((2, 4, 1))
    slots = jnp.array([[0, 1, 1, 0], [1, 1, 0, 1]], bool)
    features = jnp.arange(1.0, 7.0).reshape(3, 2, 1)
    assert merge_image_features(embeds, slots, features)[..., 0].tolist() == [[0, 1, 2, 0], [3, 4, 0, 5]]
    assert merge_image_features(embeds, slots, features, 2)[..., 0].tolist() == [[0, 1, 2, 0], [3, 4, 0, 0]]


def test_gradients_flow_to_every_parameter(tiny_a):
    def loss(params):
        out = tiny_a.model.apply({"params": params}, input_ids=tiny_a.ids, pixel_values=tiny_a.pixels, labels=tiny_a.ids)
        return out.loss

    gradients = jax.jit(jax.grad(loss))(tiny_a.params)
    flat = jax.tree_util.tree_flatten_with_path(gradients)[0]
    for path, g in flat:
        name = jax.tree_util.keystr(path)
        assert np.isfinite(g).all()
        if "k_proj']['bias" in name:  # softmax does not see a constant added to all keys
            assert np.abs(g).max() <= 1e-6
        else:
            assert np.abs(g).max() > 0, name
    remat = tiny_a.model.clone(remat=True)
    again = jax.jit(
        jax.grad(lambda p: remat.apply({"params": p}, input_ids=tiny_a.ids, pixel_values=tiny_a.pixels, labels=tiny_a.ids).loss)
    )(tiny_a.params)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(again), strict=True):
        assert np.abs(a - b).max() <= 2e-5


@pytest.mark.thorough
def test_packed_prompts_equal_prompts_alone(tiny_a):
    """Three prompts in one row, with padding between and behind, against each on its own; pictures of all in one batch."""
    long, short = tiny_a.ids[0], np.array([5, 9, 77, 3])
    one_picture = tiny_a.ids[0, : tiny_a.tokens + 3]
    parts = [(long, tiny_a.pixels), (short, None), (one_picture, tiny_a.pixels[:, 1:])]
    row, segments, spans = [], [], []
    for number, (ids, _) in enumerate(parts, 1):
        spans.append(slice(len(row), len(row) + len(ids)))
        row += [*ids, 0, 0]
        segments += [number] * len(ids) + [0, 0]
    pixels = np.concatenate([tiny_a.pixels, tiny_a.pixels[:, 1:]], axis=1)
    packed = tiny_a.apply(input_ids=np.array([row]), segment_ids=np.array([segments]), pixel_values=pixels).logits
    for span, (ids, own) in zip(spans, parts, strict=True):
        alone = tiny_a.apply(input_ids=ids[None], pixel_values=own).logits
        assert np.abs(packed[:, span] - alone).max() <= 2e-5


def test_the_former_name_of_the_vision_rule(tiny_a):
    new = tiny_a.model.clone(vision_position_ids="transformers-4.56")
    for make in (tiny_a.model.clone, lambda **fields: type(tiny_a.model)(tiny_a.model.config, **fields)):
        with pytest.warns(UserWarning, match="now called vision_position_ids"):
            assert make(position_ids="transformers-4.56").vision_position_ids == new.vision_position_ids
    with pytest.warns(UserWarning):
        old = tiny_a.model.clone(position_ids="transformers-4.56")
    assert old == new and hash(old) == hash(new), "one compilation for both"


def test_flat_floats_are_the_five_dimensional_layout(tiny_a):
    """Normalised tiles (N, H, W, 3) with their number, and any padding behind the real ones."""
    want = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels)
    flat = np.einsum("bichw->bihwc", tiny_a.pixels)[0]
    padded = np.concatenate([flat, flat[:1]])
    for pixels, options in ((flat, {}), (padded, {"num_tiles": len(flat)})):
        got = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=pixels, **options)
        assert np.abs(got.logits - want.logits).max() <= 2e-5
    with pytest.raises(InputError, match="image tokens"):
        tiny_a.apply(input_ids=tiny_a.ids, pixel_values=padded)
    with pytest.raises(InputError, match="want a pixel_attention_mask of shape"):
        tiny_a.apply(input_ids=tiny_a.ids, pixel_values=flat, pixel_attention_mask=np.ones((1, *flat.shape[:3])))
    with pytest.raises(InputError, match="float pixel_values have shape"):
        tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels[0])
