"""Pallas, where jax has it."""

import functools

__all__ = ["pallas_tpu"]


@functools.cache
def pallas_tpu():
    """Pallas and its part for TPUs, or None if this jax has none. Imported when first needed."""
    try:
        from jax.experimental import pallas
        from jax.experimental.pallas import tpu
    except ImportError:
        return None
    return pallas, tpu
