"""From messages, pictures and videos to arrays, with numpy, Pillow, tokenizers and jinja2. Imports no jax."""

from .batch import BatchFeature
from .images import SmolVLMImageProcessor
from .limits import MediaLimits
from .metadata import VideoMetadata
from .processor import SmolVLMProcessor
from .tokenizer import SmolVLMTokenizer
from .videos import SmolVLMVideoProcessor

__all__ = [
    "BatchFeature",
    "MediaLimits",
    "SmolVLMImageProcessor",
    "SmolVLMProcessor",
    "SmolVLMTokenizer",
    "SmolVLMVideoProcessor",
    "VideoMetadata",
]
