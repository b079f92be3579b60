"""The published sizes as configs, for shape work without a checkpoint: sharding plans, memory estimates, random weights."""

from .config import SmolVLMConfig, SmolVLMTextConfig, SmolVLMVisionConfig
from .errors import ConfigError

__all__ = ["PUBLISHED", "published_config"]

# name: (family, text width, layers, heads, kv heads, mlp, rotary base, vocabulary, image token, positions)
PUBLISHED = {
    "SmolVLM-256M-Instruct": ("idefics3", 576, 30, 9, 3, 1536, 1e5, 49280, 49190, 8192),
    "SmolVLM-500M-Instruct": ("idefics3", 960, 32, 15, 5, 2560, 1e5, 49280, 49190, 8192),
    "SmolVLM-Instruct": ("idefics3", 2048, 24, 32, 32, 8192, 273768.0, 49155, 49153, 16384),
    "SmolVLM2-256M-Video-Instruct": ("smolvlm", 576, 30, 9, 3, 1536, 1e5, 49280, 49190, 8192),
    "SmolVLM2-500M-Video-Instruct": ("smolvlm", 960, 32, 15, 5, 2560, 1e5, 49280, 49190, 8192),
    "SmolVLM2-2.2B-Instruct": ("smolvlm", 2048, 24, 32, 32, 8192, 130000.0, 49280, 49190, 8192),
    "granite-docling-258M": ("idefics3", 576, 30, 9, 3, 1536, 1e5, 100352, 100270, 8192),
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
    family, width, layers, heads, kv_heads, mlp, theta, vocabulary, image_token, positions = PUBLISHED[name]
    if width == 2048:
        vision = SmolVLMVisionConfig(1152, 4304, 27, 16, image_size=384, patch_size=14)
    else:
        vision = SmolVLMVisionConfig(768, 3072, 12, 12, image_size=512, patch_size=16)
    text = SmolVLMTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        rope_theta=theta,
        pad_token_id=2,
    )
    return SmolVLMConfig(
        vision_config=vision,
        text_config=text,
        scale_factor=3 if width == 2048 else 4,
        image_token_id=image_token,
        tie_word_embeddings=name.startswith("granite"),
        model_type=family,
    )
