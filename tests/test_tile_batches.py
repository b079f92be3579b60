"""Tiles are encoded in batches of a few sizes, none of it padding, whatever their number."""

import jax.numpy as jnp
import numpy as np
import pytest

from smolvlm_jax import generate, generation, load
from smolvlm_jax.pictures import encoder_batches


@pytest.mark.parametrize("most", [1, 4, 16])
def test_the_sizes_add_up(most):
    sizes = [most >> k for k in range(most.bit_length())]
    for count in range(40):
        batches = list(encoder_batches(count, sizes))
        assert sum(batches) == count and set(batches) <= set(sizes) and batches == sorted(batches, reverse=True)
    padded = list(encoder_batches(5, [8, 4]))
    assert padded == [4, 4], "without a size of one the last batch may be larger than what is left"


def test_seventeen_tiles_cost_seventeen(monkeypatch):
    """And the answer is the one of all tiles encoded at once."""
    model, params = load("tiny")
    config, sizes, encode = model.config, [], generation._encode

    def counted(model, params, features, tiles, mask, start):
        sizes.append(len(tiles))
        return encode(model, params, features, tiles, mask, start)

    monkeypatch.setattr(generation, "_encode", counted)
    tiles = np.random.default_rng(0).integers(0, 256, (17, *config.vision_config.tile_shape), np.uint8)
    ids = np.full((1, 17 * config.image_seq_len + 3), config.image_token_id, np.int32)
    ids[0, :1] = ids[0, -2:] = 5
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    found = generate(model, params, input_ids=ids, pixel_values=tiles, num_tiles=17, **options)
    assert sum(sizes) == 17 and max(sizes) > 1
    whole = model.apply({"params": params}, jnp.asarray(tiles), method="get_image_features").image_hidden_states
    again = generate(model, params, input_ids=ids, image_hidden_states=np.asarray(whole), num_tiles=17, **options)
    assert (found.sequences == again.sequences).all()
    for one, other in zip(found.logits, again.logits, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())
