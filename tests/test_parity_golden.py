"""Every stage of the tiny models against the recorded answers of transformers 5.23: at most 2e-5 apart in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smolvlm_jax.connector import pixel_shuffle
from smolvlm_jax.errors import InputError
from smolvlm_jax.vision import position_buckets

TOLERANCE = 2e-5


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert float(np.abs(np.asarray(ours, np.float32) - theirs).max()) <= TOLERANCE


def test_encoder_and_connector_stage_by_stage(tiny, golden_arrays):
    want = lambda stage: golden_arrays[f"{tiny.name}_identity_{stage}"]
    tiles = jnp.einsum("bichw->bihwc", tiny.pixels)[0]
    vision = tiny.model.bind(tiny.variables).model.vision_model
    out = vision(tiles)
    close(out.hidden_states[0], want("vision_embeddings"))
    for l in range(2):
        close(out.hidden_states[l + 1], want(f"vision_layer_{l}"))
    close(out.last_hidden_state, want("vision_post_ln"))
    close(tiny.model.bind(tiny.variables).model.connector(out.last_hidden_state), want("connector"))


def test_decoder_stage_by_stage(tiny, golden, golden_arrays):
    want = lambda stage: golden_arrays[f"{tiny.name}_identity_{stage}"]
    out = tiny.apply(input_ids=tiny.ids, pixel_values=tiny.pixels, labels=tiny.ids, output_hidden_states=True)
    close(out.hidden_states[0], want("merged_embeds"))
    for l in range(2):
        close(out.hidden_states[l + 1], want(f"text_layer_{l}"))
    close(out.hidden_states[3], want("text_norm"))
    close(out.logits, want("logits"))
    figures = golden["G38_G39_G40_model"][f"{tiny.name}_identity"]
    assert float(out.loss) == pytest.approx(figures["loss_all_tokens"], abs=TOLERANCE)
    masked = np.where(tiny.ids == 150, -100, tiny.ids)
    loss = tiny.apply(input_ids=tiny.ids, pixel_values=tiny.pixels, labels=masked).loss
    assert float(loss) == pytest.approx(figures["loss_images_masked"], abs=TOLERANCE)
    last = tiny.apply(input_ids=tiny.ids, pixel_values=tiny.pixels, logits_to_keep=1).logits
    assert float(last.std()) == pytest.approx(figures["logits_keep1"]["std"], abs=TOLERANCE)


@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_padded_batch_with_a_padding_picture(tiny, golden_arrays, jit):
    apply = jax.jit(tiny.model.apply) if jit else tiny.model.apply
    out = apply(
        tiny.variables,
        input_ids=tiny.batch_ids,
        attention_mask=tiny.batch_mask,
        pixel_values=tiny.batch_pixels,
        position_ids=tiny.batch_positions,
    )
    want = golden_arrays[f"{tiny.name}_identity_batch_logits"]
    for row in range(2):  # what stands on padding is implementation-defined
        real = tiny.batch_mask[row] == 1
        close(out.logits[row][real], want[row][real])


def test_partial_pixel_mask(tiny, golden_arrays):
    mask = np.ones((1, 2, tiny.size, tiny.size), np.int64)
    mask[:, 1, 18:, :] = 0
    features, count = tiny.model.apply(tiny.variables, tiny.pixels, mask, method="get_image_features")
    assert int(count) == 2
    close(features.reshape(-1, features.shape[-1]), golden_arrays[f"{tiny.name}_identity_features_partial"])
    full, _ = tiny.model.apply(tiny.variables, tiny.pixels, np.ones_like(mask), method="get_image_features")
    none, _ = tiny.model.apply(tiny.variables, tiny.pixels, method="get_image_features")
    close(full, np.asarray(none))


def test_the_position_rule_of_4_56(tiny):
    """Its figures for the same inputs, from running that version."""
    losses = {"A": 5.395639, "B": 5.068183, "C": 6.037174}
    old = tiny.model.clone(vision_position_ids="transformers-4.56")
    out = old.apply(tiny.variables, input_ids=tiny.ids, pixel_values=tiny.pixels, labels=tiny.ids)
    assert float(out.loss) == pytest.approx(losses[tiny.name], abs=TOLERANCE)


def test_text_only(tiny, golden):
    out = tiny.apply(input_ids=np.array([[1, 5, 7, 9]]))
    figures = golden["G38_G39_G40_model"][f"{tiny.name}_identity"]["text_only_logits"]
    logits = np.asarray(out.logits)
    assert [logits.mean(), logits.std(), logits.min(), logits.max()] == pytest.approx(
        [figures[k] for k in ("mean", "std", "min", "max")], abs=TOLERANCE
    )
    assert out.image_hidden_states is None


def test_position_ids(golden):
    for case, want in golden["G36_position_ids"].items():
        kind, side, *rest = case.split("_")
        side = int(side)
        rows, columns = (side, side) if kind == "full" else (int(n) for n in rest[0].split("x"))
        table = position_buckets(side, side)
        assert (table[columns] * (np.arange(side) < columns)).tolist() == want["row0"], case
        assert (table[rows] * (np.arange(side) < rows)).tolist() == want["col0_div_n"], case


@pytest.mark.parametrize(
    ("side", "dtype", "ids"),
    [
        (32, np.float32, [0, *range(31)]),
        (27, np.float32, [0, *range(26)]),
        (32, jnp.bfloat16, list(range(32))),
        (27, jnp.bfloat16, [*range(15), 14, 16, 16, 18, 18, 20, 20, 22, 22, 24, 24, 26]),
        (16, np.float16, list(range(16))),
    ],
)
def test_position_ids_of_4_56(side, dtype, ids):
    assert position_buckets(side, side, "transformers-4.56", dtype)[side].tolist() == ids


def test_partial_position_ids_of_4_56():
    want = "0 1 3 4 6 7 9 11 12 14 15 17 19 20 22 23 25 27 28 30"
    assert position_buckets(32, 32, "transformers-4.56")[20][:20].tolist() == [int(n) for n in want.split()]


def test_position_ids_beyond_the_table():
    """A picture of 6 × 8 patches on a 4-grid is legal for the encoder."""
    assert position_buckets(4, 6)[6].tolist() == [0, 0, 1, 2, 2, 3]
    assert position_buckets(4, 8)[8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(("scale", "side", "width"), [(2, 8, 3), (3, 9, 2), (4, 8, 3)])
def test_pixel_shuffle(golden_arrays, scale, side, width):
    x = jnp.arange(side * side * width).reshape(1, side * side, width)
    assert np.array_equal(pixel_shuffle(x, scale), golden_arrays[f"G37_shuffle_s{scale}"])


def test_pixel_shuffle_refuses_other_grids():
    for patches in (63, 49):
        with pytest.raises(InputError, match=f"{patches} patches"):
            pixel_shuffle(jnp.zeros((1, patches, 4)), 2)


@pytest.mark.thorough
def test_bf16_stays_near_f32(tiny_a, golden):
    wide = tiny_a.apply(input_ids=tiny_a.ids, pixel_values=tiny_a.pixels).logits
    half = tiny_a.model.clone(dtype=jnp.bfloat16)
    logits = half.apply(tiny_a.variables, input_ids=tiny_a.ids, pixel_values=tiny_a.pixels).logits
    assert logits.dtype == jnp.bfloat16
    theirs = golden["G38_G39_G40_model"]["bf16_vs_fp32_max_abs_same_version"]  # 0.042 for torch's own bf16
    assert float(jnp.abs(logits.astype(jnp.float32) - wide).max()) <= 2 * theirs
