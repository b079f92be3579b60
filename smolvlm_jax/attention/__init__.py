"""One attention for encoder and decoder, in several forms that compute the same thing."""

from .dispatch import SegmentMask, attention, cached_attention

__all__ = ["SegmentMask", "attention", "cached_attention"]
