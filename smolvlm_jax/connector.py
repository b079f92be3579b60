"""`SmolVLMConnector`: pixel shuffle, then one linear layer into the decoder's width."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from .config import SmolVLMConfig
from .errors import InputError
from .layers import Execution, Projection
from .sharding import Dimension, constrain
from .unbound import says_what_to_type

__all__ = ["SmolVLMConnector", "pixel_shuffle"]


def pixel_shuffle(x: jax.Array, scale: int) -> jax.Array:
    """Space to depth: "i (y r) (x c) d -> i (y x) (r c d)" with r = c = scale.

    Args:
        x: patch features (i, p, d).
        scale: side of the square of patches that become one.

    Returns:
        (i, p / scale², scale²·d).

    Raises:
        InputError: if the patches form no square grid, or `scale` does not divide its side.
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
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        vision, text = self.config.vision_config, self.config.text_config
        shuffled = Dimension(vision.hidden_size * self.config.scale_factor**2, "shuffled")
        dimensions = {"f": shuffled, "d": Dimension(text.hidden_size)}
        init, dtype = text.initializer_range, self.execution.dtype
        return Projection("ipf,fd->ipd", dimensions, initializer_range=init, dtype=dtype, name="proj")(x)


@says_what_to_type
class SmolVLMConnector(nn.Module):
    """Patch features to image tokens.

    Attributes:
        config: of the model.
        execution: how it is computed.
    """

    config: SmolVLMConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, image_hidden_states: jax.Array) -> jax.Array:
        """Pixel shuffle, then the projection.

        Args:
            image_hidden_states: patch features (i, p, d_vision).

        Returns:
            Image tokens (i, p / scale², d_text).

        Raises:
            InputError: the patches form no square grid that `scale_factor` divides.
        """
        x = pixel_shuffle(image_hidden_states, self.config.scale_factor)
        x = SmolVLMSimpleMLP(self.config, self.execution, name="modality_projection")(x)
        return constrain(x, "tile", None, None)
