"""The published sizes as configs, for shape work without a checkpoint: sharding plans, memory estimates, random weights."""

from .config import SmolVLMConfig, SmolVLMTextConfig, SmolVLMVisionConfig
from .errors import ConfigError
from .text_families import RopeScaling

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
    "Idefics3-8B-Llama3": ("idefics3", 128257, 131072, 5e5, (128259, 4096, 14336, 32, 32, 8)),
}


_LLAMA3 = RopeScaling(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def published_config(name: str) -> SmolVLMConfig:
    """The config of a published checkpoint, except for token ids of the text config, initialiser ranges and dtype.

    Args:
        name: one of PUBLISHED.

    Returns:
        The config.

    Raises:
        ConfigError: if there is no such size.
    """
    if name not in PUBLISHED:
        raise ConfigError(f"no published size {name!r}; known are {', '.join(PUBLISHED)}")
    family, image_token, positions, theta, sizes = PUBLISHED[name]
    text = SmolVLMTextConfig(*sizes, max_position_embeddings=positions, rms_norm_eps=1e-5, rope_theta=theta, pad_token_id=2)
    vision, scale = SmolVLMVisionConfig(768, 3072, 12, 12, image_size=512, patch_size=16), 4
    if text.hidden_size == 2048:
        vision, scale = SmolVLMVisionConfig(1152, 4304, 27, 16, image_size=384, patch_size=14), 3
    if text.hidden_size == 4096:
        vision, scale = SmolVLMVisionConfig(1152, 4304, 27, 16, image_size=364, patch_size=14), 2
        text = text.replace(rope_scaling=_LLAMA3, pad_token_id=128002)
    return SmolVLMConfig(
        vision_config=vision,
        text_config=text,
        scale_factor=scale,
        image_token_id=image_token,
        tie_word_embeddings=name.startswith("granite"),
        model_type=family,
    )
