"""One attention for encoder and decoder, in several forms that compute the same thing (see `forms`)."""

from .dispatch import Attended, LayerCache, attention, cached_attention, check_form, pages_decode, try_kernels
from .forms import SegmentMask

__all__ = [
    "Attended",
    "LayerCache",
    "SegmentMask",
    "attention",
    "cached_attention",
    "check_form",
    "pages_decode",
    "try_kernels",
]
