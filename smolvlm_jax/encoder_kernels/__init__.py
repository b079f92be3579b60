"""The encoder's layers in two kernels each, for TPUs in bfloat16: the same function as the modules of `vision`."""

from .layer import layer_kernels, try_layer
from .shape import INT8_CHIPS

__all__ = ["INT8_CHIPS", "layer_kernels", "try_layer"]
