"""The published sizes as configs, for shape work without a checkpoint: sharding plans, memory estimates, random weights."""

from .config import SmolVLMConfig, SmolVLMTextConfig, SmolVLMVisionConfig
from .errors import ConfigError

__all__ = ["PUBLISHED", "published_config"]

# name: (family, image token, positions, rotary base, (vocabulary, text width, mlp, layers, heads, kv heads))
PUBLISHED = {
    "SmolVLM-256M-Instruct": ("idefics3", 49190, 8192, 1e5, (49280, 576, 1536, 30, 9, 3)),
    "SmolVLM-500M-Instruct": ("idefics3", 49190, 8192, 1e5, (49280, 960, 2560, 32, 15, 5)),
    "SmolVLM-Instruct": ("idefics3", 49153, 16384, 273768.0, (49155, 2048, 8192, 24, 32, 32)),
    "SmolVLM2-256M-Video-Instruct": ("smolvlm", 49190, 8192, 1e5, (49280, 576, 1536, 30, 9, 3)),
    "SmolVLM2-500M-Video-Instruct": ("smolvlm", 49190, 8192, 1e5, (49280, 960, 2560, 32, 15, 5)),
    "SmolVLM2-2.2B-Instruct": ("smolvlm", 49190, 8192, 130000.0, (49280, 2048, 8192, 24, 32, 32)),
    "granite-docling-258M": ("idefics3", 100270, 8192, 1e5, (100352, 576, 1536, 30, 9, 3)),
}


def published_config(name: str) -> SmolVLMConfig:
    """The config of a published checkpoint, except for token ids of the text config, initialiser ranges and dtype.

    Args:
        name: one of PUBLISHED.

    Raises:
        ConfigError: if there is no such size.
    """
    if name not in PUBLISHED:
        raise ConfigError(f"no published size {name!r}; known are {', '.join(PUBLISHED)}")
    family, image_token, positions, theta, sizes = PUBLISHED[name]
    text = SmolVLMTextConfig(
        *sizes, head_dim=64, max_position_embeddings=positions, rms_norm_eps=1e-5, rope_theta=theta, pad_token_id=2
    )
    large = text.hidden_size == 2048
    if large:
        vision = SmolVLMVisionConfig(1152, 4304, 27, 16, image_size=384, patch_size=14)
    else:
        vision = SmolVLMVisionConfig(768, 3072, 12, 12, image_size=512, patch_size=16)
    return SmolVLMConfig(
        vision_config=vision,
        text_config=text,
        scale_factor=3 if large else 4,
        image_token_id=image_token,
        tie_word_embeddings=name.startswith("granite"),
        model_type=family,
    )
