"""Pictures whose values are rescaled already."""

import numpy as np

from smolvlm_jax import SmolVLMImageProcessor
from smolvlm_jax.processing import pixels


def test_rescaling_again_is_said_once(caplog):
    process = SmolVLMImageProcessor()
    whole = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)
    pixels._announce_rescaling.cache_clear()
    process([whole])
    process([whole / 255], do_rescale=False)
    assert not caplog.text
    for _ in range(2):
        process([whole / 255])
    assert caplog.text.count("rescaled again; pass do_rescale=False") == 1
