"""`SmolVLMConnector`: pixel shuffle, then one linear layer into the decoder's width."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from .config import SmolVLMConfig
from .errors import InputError
from .layers import Projection
from .sharding import constrain

__all__ = ["SmolVLMConnector", "pixel_shuffle"]


def pixel_shuffle(x: jax.Array, scale: int) -> jax.Array:
    """Space to depth, "i (y r) (x c) d -> i (y x) (r c d)" with r = c = scale: (i, p, d) -> (i, p/scale², scale²·d).

    The grid is square and its side a multiple of scale; anything else is an InputError.
    """
    i, p, d = x.shape
    side = math.isqrt(p)
    if side * side != p or side % scale:
        raise InputError(f"{p} patches do not form a square grid that scale_factor {scale} divides")
    small = side // scale
    x = x.reshape(i, small, scale, small, scale, d)
    x = jnp.einsum("iyrxcd->iyxrcd", x)
    return x.reshape(i, small * small, scale * scale * d)


class SmolVLMSimpleMLP(nn.Module):
    """transformers' name for what is a single projection without bias."""

    config: SmolVLMConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = self.config.vision_config.hidden_size * self.config.scale_factor**2
        d = self.config.text_config.hidden_size
        init = self.config.text_config.initializer_range
        return Projection("ipf,fd->ipd", (width, d), ("shuffled", None), False, init, self.dtype, name="proj")(x)


class SmolVLMConnector(nn.Module):
    config: SmolVLMConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image_hidden_states: jax.Array) -> jax.Array:
        """Patch features (i, p, d_vision) -> image tokens (i, p / scale², d_text)."""
        x = pixel_shuffle(image_hidden_states, self.config.scale_factor)
        x = SmolVLMSimpleMLP(self.config, self.dtype, name="modality_projection")(x)
        return constrain(x, "tile", None, None)
