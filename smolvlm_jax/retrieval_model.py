"""`ColIdefics3`: the model with a projection in place of the output head, which turns every token into a short vector.

Its reference is the class of that name in colpali-engine (ColPali, arXiv:2407.01449), of which ColSmolVLM's checkpoints are.
"""

from typing import Any

import jax
import jax.numpy as jnp

from .config import SmolVLMConfig
from .errors import ConfigError, InputError
from .layers import Projection, dimensions
from .model import SmolVLMForConditionalGeneration, SmolVLMModel
from .sharding import Dimension, constrain

__all__ = ["ColIdefics3", "model_of", "require_text"]

_NO_TEXT = "a retrieval model makes vectors and no text: call embed()"


class ColIdefics3(SmolVLMForConditionalGeneration):
    """Pictures and text in, a unit vector for each token out. Fields as in `SmolVLMForConditionalGeneration`."""

    def setup(self) -> None:
        if self.config.embedding_dim is None:
            raise ConfigError("a retrieval model needs embedding_dim, the width of its vectors")
        self.model = SmolVLMModel(
            self.config, self.dtype, self.vision_position_ids, self.remat, self.scan_layers, self.attention
        )
        text = self.config.text_config
        sizes = {**dimensions(text), "e": Dimension(self.config.embedding_dim)}
        self.linear = Projection(
            "btd,de->bte", sizes, use_bias=True, initializer_range=text.initializer_range, dtype=self.dtype
        )

    def head(self, hidden: jax.Array) -> jax.Array:
        """A retrieval model has no output head.

        Args:
            hidden: anything.

        Returns:
            Nothing.

        Raises:
            InputError: always.
        """
        raise InputError(_NO_TEXT)

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        *,
        attention_mask: jax.Array | None = None,
        images_only: bool = False,
        **inputs: Any,
    ) -> Any:
        """The vectors of all tokens.

        Args:
            input_ids: int (b, t).
            attention_mask: (b, t), 1 = real.
            images_only: zeros for the tokens that stand for no picture, if there are pictures (`mask_non_image_embeddings`
                in the reference).
            **inputs: as in `SmolVLMForConditionalGeneration.__call__`, but for what is about logits.

        Returns:
            (b, t, e), each of length 1, and zeros at padding.

        Raises:
            InputError: an argument that is about logits.
        """
        if refused := sorted({"labels", "logits_to_keep"} & set(inputs)):
            raise InputError(f"{refused[0]} is about logits: {_NO_TEXT}")
        hidden = self.model(input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
        vectors = self.linear(hidden)
        wide = vectors.astype(jnp.float32)
        vectors = (wide / jnp.linalg.norm(wide, axis=-1, keepdims=True)).astype(self.dtype)
        if attention_mask is not None:
            vectors = jnp.where(attention_mask[..., None] != 0, vectors, 0)
        pictures = any(inputs.get(name) is not None for name in ("pixel_values", "image_hidden_states"))
        if images_only and pictures and input_ids is not None:
            vectors = jnp.where((input_ids == self.config.image_token_id)[..., None], vectors, 0)
        return constrain(vectors, "batch", None, None)


def require_text(model: SmolVLMForConditionalGeneration) -> None:
    """Raise InputError for a model that makes no text."""
    if isinstance(model, ColIdefics3):
        raise InputError(_NO_TEXT)


def model_of(config: SmolVLMConfig, **fields: Any) -> SmolVLMForConditionalGeneration:
    """The model that a config describes: one with an output head, or a retrieval model. fields: as the classes take them."""
    kind = SmolVLMForConditionalGeneration if config.embedding_dim is None else ColIdefics3
    return kind(config, **fields)
